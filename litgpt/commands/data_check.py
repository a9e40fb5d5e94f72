"""`litgpt data check`"""

import json as json_format
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from rich.table import Table
from rich.text import Text

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import open_checkpoint
from litgpt.data.check import (
    answer_lengths,
    bad_rows,
    check_ids,
    data_problems,
    duplicates,
    histogram,
    log_histogram,
    percentiles,
    source_table,
)
from litgpt.data.data_module import DataModule, TokenizedDataset
from litgpt.data.lost import EARLIER
from litgpt.data.tokens import ANSWER, IN_LOSS, REJECTED, Counts, Details, TokenizedRows
from litgpt.errors import UserError, remark
from litgpt.families import read_config
from litgpt.methods.adapter_folder import is_adapter, open_adapter
from litgpt.methods.model_source import find_base, style_folder, tokenizer_folder
from litgpt.model.config import Config
from litgpt.storage.files import is_there, read_json
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import TrainArgs
from litgpt.train.objectives import OBJECTIVES, Name, Objective, PreferenceArgs, balance
from litgpt.train.progress import Screen
from litgpt.train.run import row_limit

LONG = (512, 1024, 2048, 4096)  # lengths in tokens over which rows are counted
MIN_WIDTH = 80  # of the table of files, whose lines a narrower terminal breaks
WIDE = 200  # its maximum width in files and pipes
N_REASONS = 8  # reasons why rows are bad that the report names
LONGER = 1.5  # a ratio of mean lengths from which a model may learn length
Kind = Literal["bad", "duplicates", "truncated", "lost", "identical"]
BY_FORM: dict[str, Name] = {"preference": "dpo", "ranked": "dpo", "label": "kto"}
COMMANDS = {"pair": "litgpt finetune dpo, orpo, simpo, or cpo", "label": "litgpt finetune kto"}
SIDES = {"pair": ("chosen", "rejected"), "label": ("desirable", "undesirable")}


class Checked:
    """The rows of a run and what was found in them.

    Args:
        objective: What the rows are for.
        preference: Options of its loss.
        loaded: The rows.
        found: What was found in the training rows.
        val_found: The same for separate validation rows.
    """

    def __init__(
        self,
        objective: Objective,
        preference: PreferenceArgs,
        loaded: TokenizedDataset,
        found: Details,
        val_found: Details,
    ) -> None:
        self.objective, self.preference, self.loaded = objective, preference, loaded
        self.sets = [(loaded.train.stored(), loaded.sources, found)]
        if loaded.val_sources is not None:
            self.sets.append((loaded.val.stored(), loaded.val_sources, val_found))

    def rows(self) -> Iterator[tuple[TokenizedRows, int, str, str]]:
        """All rows that can be used: the set, the number in it, the file, and the position."""
        for rows, sources, found in self.sets:
            paths = (str(source.path) for source, counts in sources for _ in range(counts.kept))
            for i, (path, where) in enumerate(zip(paths, found.positions)):
                yield rows, i, path, where

    def lengths(self) -> torch.Tensor:
        """Tokens of each training row before it was truncated."""
        return torch.tensor(self.sets[0][2].lengths, dtype=torch.int64)

    def listed(self, kind: Kind) -> Iterator[dict[str, Any]]:
        """The rows of a kind, each with its file, position, and reason."""
        if kind == "duplicates":
            for rows, sources, found in self.sets:
                paths = [str(source.path) for source, counts in sources for _ in range(counts.kept)]
                for i, first in enumerate(rows.first_equal().tolist()):
                    if i != first:
                        reason = f"equal to {found.positions[first]}"
                        yield entry(paths[i], found.positions[i], reason)
            return
        for _, _, found in self.sets:
            for source, finding in found.findings:
                if finding.kind == kind:
                    yield entry(str(source.path), finding.where, finding.reason)


def entry(path: str, where: str, reason: str) -> dict[str, Any]:
    return {"file": path, "row": number_of(where, path), "where": where, "reason": reason}


def number_of(where: str, path: str) -> Optional[int]:
    """The number of the line or row in a position."""
    found = re.search(r"(?:line|row) (\d+)", where.removeprefix(path))
    return int(found[1]) if found else None


def main(
    checkpoint_dir: Path,
    data: Optional[DataModule] = None,
    objective: Optional[Literal["supervised", Name]] = None,
    train: TrainArgs = TrainArgs(),  # noqa: B008
    json: bool = False,
    list: Optional[Kind] = None,
    show: int = 3,
    sample: int = 0,
    rows: Optional[str] = None,
    **finetune: Any,
) -> None:
    """Check the data of a finetuning run before you start it: rows, tokens, duplicates, and target tokens.

    Takes the config and the options of a finetuning command. Options that do not concern the data have no effect. Reads
    all rows, whatever is wrong with them, and exits with 1 if it finds a problem. Needs no weights.

    Args:
        checkpoint_dir: The model: a Hugging Face folder, or the name of one under checkpoints/.
        data: The rows: files, or the name of a data set.
        objective: The command that the rows are for, or supervised for those that train on single answers. If null, dpo
            if the first row has a chosen and a rejected answer, kto if it has a label, else supervised.
        train: Length, batch size, and learning rate of the run.
        json: Print the report as a JSON object.
        list: Print all rows of this kind as JSONL: bad, duplicates, truncated, lost, or identical.
        show: Number of training rows to show, with their target tokens marked.
        sample: Number of rows to show from every file.
        rows: Rows to show, by their numbers in the files, such as 181,204.
    """
    if json and list is not None:
        raise UserError("--json prints the report, --list prints rows. Pass only one of them.")
    if min(show, sample) < 0:
        raise UserError(f"--show {show} and --sample {sample} must be at least 0.")
    chosen = objective_of(objective, data)
    data = chosen.source(data)
    folder = base = find_folder(checkpoint_dir, weights=False)
    own = find_folder(finetune["initial_adapter"]) if finetune.get("initial_adapter") else folder
    if is_adapter(folder):
        base = find_base(open_adapter(folder), f"Pass the base as the model, and --initial_adapter {folder}.", False)
    config, folder = config_of(base), tokenizer_folder(own, base)
    tokenizer = Tokenizer(folder, base, config.padded_vocab_size)
    limit = row_limit(train, config, data)
    numbers = row_numbers(rows)
    found, val_found = Details(), Details()
    screen = Screen(active=not json and list is None)
    with screen.counting("rows tokenized") as on_progress:
        loaded = data.load(
            tokenizer,
            style_folder(own, folder),
            limit,
            on_progress=on_progress,
            context=config.block_size,
            details=found,
            val_details=val_found,
        )
    checked = Checked(chosen, finetune.get("preference") or PreferenceArgs(), loaded, found, val_found)
    check_ids(loaded, config.padded_vocab_size)
    findings = found.findings + val_found.findings
    problems = bad_rows(loaded, findings, skip=data.on_bad_row == "skip") + data_problems(loaded)
    if list is not None:
        for fields in checked.listed(list):
            print(json_format.dumps(fields, ensure_ascii=False))
        for problem in problems:
            remark(problem)
    elif json:
        print_json(checked, problems)
    else:
        Report(screen, checked, tokenizer, limit).print(problems, show, sample, numbers)
    if problems:
        sys.exit(1)


def objective_of(name: Optional[str], data: Optional[DataModule]) -> Objective:
    """The objective of this name, or by default that of the first row."""
    if name is None and data is not None:
        form, _ = data.first_form(data.sources()[0], checks=True)
        name = BY_FORM.get(form)
    return OBJECTIVES[name](name, PreferenceArgs()) if name in OBJECTIVES else Objective()


def config_of(folder: Path) -> Config:
    """The configuration of a model folder that may have no weights."""
    if not is_there(folder / "config.json"):
        return open_checkpoint(folder).config
    try:
        return read_config(read_json(folder / "config.json"), name=folder.name)
    except UserError as e:
        raise UserError(f"{folder}: {e}") from e


def row_numbers(text: Optional[str]) -> list[int]:
    if not text:
        return []
    words = re.split(r"[\s,]+", str(text).strip("[] "))
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--rows {text}: expected numbers of rows such as 181,204.")
    return [int(word) for word in words]


def print_json(checked: Checked, problems: list[str]) -> None:
    loaded, lengths = checked.loaded, checked.lengths()
    sets = {"train": loaded.train, "val": loaded.val}
    print(
        json_format.dumps(
            {
                "objective": checked.objective.name or "supervised",
                "prompt_style": loaded.style.name,
                "mask_prompt": loaded.mask_prompt,
                "files": source_table(loaded.sources),
                "val_files": source_table(loaded.val_sources or []),
                "counts": asdict(loaded.counts),
                "val_counts": asdict(loaded.val_counts) if loaded.val_counts else None,
                "lengths": {**percentiles(lengths), "over": {n: int((lengths > n).sum()) for n in LONG}},
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
                **preference_numbers(checked),
                "problems": problems,
            },
            indent=2,
        )
    )


def preference_numbers(checked: Checked) -> dict[str, Any]:
    """The answers of pairs or labels, and the weight that balances labels."""
    if checked.objective.unit == "row":
        return {}
    rows = checked.loaded.train
    answers = dict(zip(SIDES[checked.objective.unit], map(asdict, answer_lengths(rows).values())))
    is_label = checked.objective.unit == "label"
    return {"answers": answers, **({"weights": balance(rows, checked.preference)[1]} if is_label else {})}


class Report:
    """The report on the screen.

    Args:
        limit: Maximum length of a row, in tokens.
    """

    def __init__(self, screen: Screen, checked: Checked, tokenizer: Tokenizer, limit: int) -> None:
        self.screen, self.console, self.checked = screen, screen.console, checked
        self.loaded, self.tokenizer, self.limit = checked.loaded, tokenizer, limit
        self.unit = checked.objective.unit

    def print(self, problems: list[str], show: int, sample: int, numbers: list[int]) -> None:
        self.print_files()
        self.print_summary()
        self.print_lengths()
        self.print_bad()
        self.print_notes()
        self.print_rows(show, sample, numbers)
        self.console.rule()
        for problem in problems:
            self.console.print(f"ERROR: {problem}", markup=False, style="bold red", soft_wrap=True)
        if not problems:
            self.screen.say("No problems found.")

    def print_files(self) -> None:
        """A line for each file, and their sum."""
        paths = [str(source.path) for source, _ in self.loaded.all_sources]
        if len({os.path.dirname(path) for path in paths}) == 1 and not paths[0].startswith("hf:"):
            paths = [os.path.basename(path) for path in paths]
        table = Table(box=None, pad_edge=False)
        table.add_column("file", overflow="fold", min_width=min(24, max(map(len, paths))))
        for name in ("rows", "used", "skipped", "truncated", "weight", "tokens"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("forms", overflow="fold")
        for title, sources in (("", self.loaded.sources), (" (validation)", self.loaded.val_sources or [])):
            lines = source_table(sources)
            for line in lines:
                line["file"] = paths.pop(0)
                table.add_row(*cells(line, title))
            if len(lines) > 1:
                numbers = ("rows", "used", "skipped", "truncated", "tokens")
                sums = {name: sum(line[name] for line in lines) for name in numbers}
                table.add_row(*cells({"file": "total", "weight": None, "forms": {}, **sums}, title))
        table.width = MIN_WIDTH if self.console.width < MIN_WIDTH else None
        self.console.print(table, soft_wrap=True, width=None if self.screen.interactive else WIDE)

    def print_summary(self) -> None:
        loaded, counts = self.loaded, sum((c for _, c in self.loaded.all_sources), Counts())
        skipped = {
            "bad": counts.bad,
            "without a target token": counts.no_targets,
            "too long": counts.too_long,
            "excluded by label": counts.skipped if self.unit != "pair" else 0,
            "with equal scores": counts.skipped if self.unit == "pair" else 0,
            "with equal answers": counts.identical,
            "with lost parts": counts.dropped_lost,
        }
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
        sets = (("training", loaded.train), ("validation", loaded.val))
        described = {
            name: f"{len(rows):,} rows, {int(rows.lengths.sum()):,} tokens, {rows.trained_share():.1%} target tokens"
            for name, rows in sets
            if len(rows)
        }
        equal = duplicates(loaded)
        dropped = f"{loaded.n_duplicates:,} dropped, " if loaded.n_duplicates else ""
        both = f"{equal.train:,} in training, {equal.val:,} in validation, {equal.across:,} in both"
        prompts = "prompts and answers" if self.unit == "row" else "the answers, and the prompts of chosen ones"
        rows = {
            **({"rows for": COMMANDS[self.unit]} if self.unit != "row" else {}),
            "skipped": reasons or "none",
            "prompt style": loaded.style.name,
            "trained on": "the answers" if loaded.mask_prompt else prompts,
            "limit": f"{self.limit:,} tokens",
            **described,
            "duplicates": f"{dropped}{both}",
        }
        self.screen.table("", rows)

    def print_lengths(self) -> None:
        lengths = self.checked.lengths()
        if not len(lengths):
            return
        shares = ", ".join(f"{name} {n:,}" for name, n in percentiles(lengths).items())
        over = ", ".join(f"{int((lengths > n).sum()):,} over {n:,}" for n in LONG)
        bars = log_histogram(lengths)
        most = max(n for _, _, n in bars)
        self.screen.say()
        row = "row" if self.unit == "row" else "answer, with its prompt"
        self.screen.say(f"Tokens per training {row}: {shares}")
        self.screen.say(f"Long {'rows' if self.unit == 'row' else 'ones'}: {over}")
        for start, end, n in bars:
            self.screen.say(f"{start:7,} to {end:<7,} {'█' * -(-40 * n // most)} {n:,}")

    def print_bad(self) -> None:
        """Why rows are bad, grouped by reasons that differ only in their position."""
        reasons: dict[str, list[str]] = {}
        for _, _, found in self.checked.sets:
            for _, finding in found.findings:
                if finding.kind == "bad":
                    same = re.sub(r"\d+|'.*?'", "", finding.reason.replace(finding.where, ""))
                    reasons.setdefault(same, []).append(finding.reason)
        groups = sorted(reasons.values(), key=len, reverse=True)
        if groups:
            self.screen.say()
        for group in groups[:N_REASONS]:
            rows = "1 bad row" if len(group) == 1 else f"{len(group):,} bad rows like this"
            self.screen.say(f"{rows}: {group[0]}")
        if len(groups) > N_REASONS:
            self.screen.say(f"and {len(groups) - N_REASONS:,} other reasons; --list bad prints all bad rows")

    def print_notes(self) -> None:
        counts = sum((c for _, c in self.loaded.all_sources), Counts())
        notes = self.loaded.notes()
        if counts.lost.get(EARLIER):
            notes.append(f"{counts.lost[EARLIER]:,} rows have {EARLIER}, which the prompt style does not show.")
        if counts.no_stop and self.unit == "row":
            notes.append(f"{counts.no_stop:,} rows train no stop token (truncated rows lose theirs).")
        if counts.short_prompts:
            notes.append(f"{counts.short_prompts:,} rows have an almost empty prompt.")
        if self.unit != "row":
            notes += self.preference_notes(counts)
        for note in notes:
            self.screen.say(f"NOTE: {note}")

    def preference_notes(self, counts: Counts) -> list[str]:
        """What a user should know about pairs or labeled answers."""
        found = []
        if counts.no_stop:
            found.append(f"{counts.no_stop:,} rows have an answer without a stop token.")
        if counts.too_long:
            remedy = " Raise --train.max_seq_length." if self.loaded.below_context else ""
            found.append(
                f"{counts.too_long:,} rows dropped: longer than {self.limit:,} tokens. Answers are never truncated, "
                f"because they would lose their stop token.{remedy}"
            )
        if counts.identical:
            found.append(
                f"{counts.identical:,} pairs dropped: both answers are the same. --list identical prints them."
            )
        if counts.other_prompts:
            found.append(f"{counts.other_prompts:,} pairs have answers to different prompts.")
        rows, names = self.loaded.train, SIDES[self.unit]
        means = [lengths.mean_tokens for lengths in answer_lengths(rows).values()]
        if self.unit == "label":
            found += balance(rows, self.checked.preference)[0]
        if not all(means):
            return found
        found.append("Mean length of answers: " + ", ".join(f"{n} {m:,.0f} tokens" for n, m in zip(names, means)) + ".")
        if max(means) >= LONGER * min(means):
            longer, shorter = names if means[0] > means[1] else reversed(names)
            found.append(
                f"The {longer} answers are {max(means) / min(means):.1f} times as long as the {shorter} ones. The "
                "model may learn the length instead of what makes them better."
            )
        return found

    def print_rows(self, show: int, sample: int, numbers: list[int]) -> None:
        """Show rows, with their target tokens marked, and the reasons of those that cannot be used."""
        train, positions = self.loaded.train, self.checked.sets[0][2].positions
        for i in train.index[:show].tolist():
            self.print_row(train.stored(), i, positions[i])
        if sample:
            by_file: dict[str, list[tuple[TokenizedRows, int, str]]] = {}
            for rows, i, path, where in self.checked.rows():
                by_file.setdefault(path, []).append((rows, i, where))
            for found in by_file.values():
                n = min(sample, len(found))
                for k in range(n):
                    self.print_row(*found[k * len(found) // n])
        for number in numbers:
            matching = [row for row in self.checked.rows() if number_of(row[3], row[2]) == number]
            for rows, i, _, where in matching:
                self.print_row(rows, i, where)
            dropped = [f.reason for *_, found in self.checked.sets for s, f in found.findings
                if number_of(f.where, str(s.path)) == number]  # fmt: skip
            for reason in dropped:
                self.screen.say(f"row {number}: {reason}")
            if not matching and not dropped:
                self.screen.say(f"row {number}: no such row, or it was skipped")

    def print_row(self, rows: TokenizedRows, i: int, where: str) -> None:
        color = self.console.is_terminal
        self.console.rule()
        self.screen.say(f"{where}: target tokens are {'green' if color else 'in [[ ]]'}")
        if self.unit == "row":
            self.console.print(marked(*rows.row(i), self.tokenizer, color), soft_wrap=True)
            return
        sides = rows.sequences(i)
        for number, (ids, mask) in enumerate(sides):
            name = SIDES[self.unit][bool(mask[-1] & REJECTED)]
            start = int((mask & ANSWER).bool().int().argmax())  # of the answer
            after = "after the same prompt" if number and ids[:start].equal(sides[0][0][:start]) else ""
            self.screen.say(f"{name} answer{', ' * bool(after)}{after}:")
            part = slice(start if after else 0, None)
            self.console.print(marked(ids[part], mask[part], self.tokenizer, color), soft_wrap=True)


def cells(line: dict[str, Any], title: str) -> list[str]:
    numbers = [f"{line[name]:,}" for name in ("rows", "used", "skipped", "truncated")]
    weight = "" if line["weight"] is None else f"{line['weight']:g}"
    forms = ", ".join(line["forms"])
    return [f"{line['file']}{title}", *numbers, weight, f"{line['tokens']:,}", forms]


def marked(ids: torch.Tensor, mask: torch.Tensor, tokenizer: Tokenizer, color: bool) -> Text:
    """Tokens as text, including special tokens, with the target tokens marked."""
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
