"""`litgpt data check`"""

import itertools
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
from litgpt.data.alpaca import or_alpaca
from litgpt.data.base import TokenizedDataset
from litgpt.data.check import check_ids, data_problems, duplicates, histogram
from litgpt.data.lost import EARLIER
from litgpt.data.tokens import TRAINED
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
    """Check the data of a finetune before it runs: rows, tokens, duplicates, and which tokens are trained.

    Takes the config and the options of a finetune, and ignores those that do not affect the data. Exits with 1 if the
    data has problems.

    Args:
        checkpoint_dir: The model: a Hugging Face folder, or the name of one under checkpoints/.
        data: The data set, for example JSON with --data.json_path FILE.
        train: Options of the training, of which the length of the rows matters here.
        json: Print one JSON object and nothing else.
        show: Number of rows to show, with their trained tokens marked.
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
    report: dict[str, Any] = {
        "prompt_style": loaded.style.name,
        "mask_prompt": loaded.mask_prompt,
        "counts": asdict(loaded.counts),
        "val_counts": asdict(loaded.val_counts) if loaded.val_counts else None,
    }
    for name, rows in (("train", loaded.train), ("val", loaded.val)):
        report[name] = {
            "rows": len(rows),
            "tokens": int(rows.lengths.sum()),
            "longest": int(rows.lengths.max()) if len(rows) else 0,
            "trained_share": rows.trained_share(),
            "histogram": histogram(rows),
        }
    print(json.dumps({**report, "duplicates": asdict(duplicates(loaded)), "harm": problems}, indent=2))


def print_report(
    console: Console, loaded: TokenizedDataset, tokenizer: Tokenizer, limit: int, show: int, problems: list[str]
) -> None:
    def entry(name: str, text: str) -> None:
        console.print(f"{name:17} {text}", markup=False)

    counts = loaded.counts
    entry("rows", f"{counts.rows:,} read: {', '.join(f'{n:,} {form}' for form, n in counts.forms.items())}")
    entry("prompt style", loaded.style.name)
    entry("trained", "the answers" if loaded.mask_prompt else "prompts and answers")
    entry("limit", f"{limit:,} tokens: {counts.cut:,} truncated, {counts.too_long:,} dropped")
    skipped = (
        f"{counts.untrained:,} without a trained token, {counts.bad:,} invalid, {counts.left_out:,} by their label"
    )
    entry("skipped", skipped)
    for name, rows in (("training", loaded.train), ("validation", loaded.val)):
        if len(rows):
            lengths = f"{int(rows.lengths.sum()):,} tokens, longest {int(rows.lengths.max()):,}"
            entry(name, f"{len(rows):,} rows, {lengths}, {rows.trained_share():.1%} trained")
    twice = duplicates(loaded)
    across = f"{twice.across:,} of validation in training"
    entry("duplicates", f"{twice.train:,} in training, {twice.val:,} in validation, {across}")
    bars = histogram(loaded.train)
    for start, end, n in bars:
        entry(f"{start:6,}-{end:<6,}", f"{'█' * -(-40 * n // max(n for _, _, n in bars))} {n:,}")
    if counts.lost.get(EARLIER):
        entry("note", f"{counts.lost[EARLIER]:,} rows have {EARLIER}, which the prompt style does not show")
    if loaded.counts.no_stop:
        entry("note", f"{counts.no_stop:,} rows have no trained stop token (truncated rows lose theirs)")
    marking = "green" if console.is_terminal else "in [[ ]]"
    for i in range(min(show, len(loaded.train))):
        console.rule(f"row {i + 1}: trained tokens are {marking}", align="left")
        console.print(marked_row(loaded, tokenizer, i, console.is_terminal))
    console.rule()
    for problem in problems:
        console.print(f"PROBLEM: {problem}", markup=False, style="bold red")
    if not problems:
        console.print("No problems found.", markup=False)


def marked_row(loaded: TokenizedDataset, tokenizer: Tokenizer, i: int, color: bool) -> Text:
    """A row as text, including special tokens, with the trained tokens marked."""
    ids, marks = loaded.train.row(i)
    text, position = Text(), 0
    for is_trained, run in itertools.groupby((marks & TRAINED).bool().tolist()):
        n = len(list(run))
        words = tokenizer.decode(ids[position : position + n].tolist(), skip_special=False)
        position += n
        if is_trained:
            text.append(words if color else f"[[{words}]]", style="green")
        else:
            text.append(words, style="dim")
    return text
