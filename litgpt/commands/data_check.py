"""`litgpt data check`"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.text import Text

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import open_checkpoint
from litgpt.data import DataModule
from litgpt.data.base import TokenizedDataset
from litgpt.data.check import check_ids, data_problems, duplicates, histogram
from litgpt.data.lost import EARLIER
from litgpt.data.named import or_alpaca
from litgpt.data.tokens import IN_LOSS
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import TrainArgs
from litgpt.train.run import row_limit


def main(
    checkpoint_dir: Path,
    data: Optional[DataModule] = None,
    train: TrainArgs = TrainArgs(),  # noqa: B008
    json: bool = False,
    show: int = 3,
    **finetune: Any,
) -> None:
    """Check the data of a finetuning run before you start it: rows, tokens, duplicates, and target tokens.

    Takes the config and the options of a finetuning command. Options that do not concern the data have no effect. Exits
    with 1 if it finds a problem.

    Args:
        checkpoint_dir: The model: a Hugging Face folder, or the name of one under checkpoints/.
        data: The rows, for example JSON with --data.json_path FILE.
        train: Length, batch size, and learning rate of the run.
        json: Print the report as a JSON object.
        show: Number of rows to show, with their target tokens marked.
    """
    data = or_alpaca(data)
    checkpoint = open_checkpoint(find_folder(checkpoint_dir))
    tokenizer = Tokenizer(checkpoint.folder, n_embeddings=checkpoint.config.padded_vocab_size)
    limit = row_limit(train, checkpoint.config, data)
    loaded = data.load(tokenizer, checkpoint.folder, limit, context=checkpoint.config.block_size)
    check_ids(loaded, checkpoint.config.padded_vocab_size)
    problems = data_problems(loaded)
    if json:
        print_json(loaded, problems)
    else:
        print_report(Console(highlight=False, soft_wrap=True), loaded, tokenizer, limit, show, problems)
    if problems:
        sys.exit(1)


def print_json(loaded: TokenizedDataset, problems: list[str]) -> None:
    sets = {"train": loaded.train, "val": loaded.val}
    print(
        json.dumps(
            {
                "prompt_style": loaded.style.name,
                "mask_prompt": loaded.mask_prompt,
                "counts": asdict(loaded.counts),
                "val_counts": asdict(loaded.val_counts) if loaded.val_counts else None,
                **{
                    name: {
                        "rows": len(rows),
                        "tokens": int(rows.lengths.sum()),
                        "longest": int(rows.lengths.max()) if len(rows) else 0,
                        "trained_share": rows.trained_share(),
                        "histogram": histogram(rows),
                    }
                    for name, rows in sets.items()
                },
                "duplicates": asdict(duplicates(loaded)),
                "problems": problems,
            },
            indent=2,
        )
    )


def print_report(
    console: Console, loaded: TokenizedDataset, tokenizer: Tokenizer, limit: int, show: int, problems: list[str]
) -> None:
    def line(name: str, text: str) -> None:
        console.print(f"{name:17} {text}", markup=False)

    counts = loaded.counts
    forms = ", ".join(f"{n:,} {form}" for form, n in counts.forms.items())
    line("rows", f"{counts.rows:,} read: {forms}")
    line("prompt style", loaded.style.name)
    line("trained on", "the answers" if loaded.mask_prompt else "prompts and answers")
    line("limit", f"{limit:,} tokens: {counts.truncated:,} truncated, {counts.too_long:,} dropped")
    line(
        "skipped",
        f"{counts.no_targets:,} without a target token, {counts.bad:,} bad, {counts.skipped:,} excluded by label",
    )
    for name, rows in (("training", loaded.train), ("validation", loaded.val)):
        if len(rows):
            line(
                name,
                f"{len(rows):,} rows, {int(rows.lengths.sum()):,} tokens, longest {int(rows.lengths.max()):,}, "
                f"{rows.trained_share():.1%} target tokens",
            )
    found = duplicates(loaded)
    line(
        "duplicates",
        f"{found.train:,} in training, {found.val:,} in validation, {found.across:,} in both",
    )
    bars = histogram(loaded.train)
    for start, end, n in bars:
        line(f"{start:6,}-{end:<6,}", f"{'█' * -(-40 * n // max(n for _, _, n in bars))} {n:,}")
    if counts.lost.get(EARLIER):
        line("note", f"{counts.lost[EARLIER]:,} rows have {EARLIER}, which the prompt style does not show")
    if loaded.counts.no_stop:
        line("note", f"{counts.no_stop:,} rows train no stop token (truncated rows lose theirs)")
    for i in range(min(show, len(loaded.train))):
        console.rule(
            f"row {i + 1}: target tokens are " + ("green" if console.is_terminal else "in [[ ]]"), align="left"
        )
        console.print(marked_row(loaded, tokenizer, i, console.is_terminal))
    console.rule()
    for problem in problems:
        console.print(f"ERROR: {problem}", markup=False, style="bold red")
    if not problems:
        console.print("No problems found.", markup=False)


def marked_row(loaded: TokenizedDataset, tokenizer: Tokenizer, i: int, color: bool) -> Text:
    """A row as text, including special tokens, with its target tokens marked."""
    ids, mask = loaded.train.row(i)
    in_loss = (mask & IN_LOSS).bool().tolist()
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or in_loss[end] != in_loss[start]:
            run = tokenizer.decode(ids[start:end].tolist(), skip_special=False)
            if in_loss[start]:
                text.append(run if color else f"[[{run}]]", style="green")
            else:
                text.append(run, style="dim")
            start = end
    return text
