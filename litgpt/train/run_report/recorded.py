"""What a report shows of the files of a run. What is missing, half-written, damaged, or of another form is left out."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from litgpt.checkpoint.model_card import TRAINING
from litgpt.errors import UserError, without_secrets
from litgpt.storage.files import read_json, read_text
from litgpt.storage.outputs import CARD
from litgpt.train.examples import read_examples
from litgpt.train.metrics import ALL, LINE, METRICS, events_of, lines_until
from litgpt.train.resume.folder import EXAMPLES
from litgpt.train.run_lock import LOCK, read_lock
from litgpt.train.runs import LIGHTNING, RESULTS, Points, RecordedRun, find_run

LITGPT_NAMES = {"learning_rate": "lr", "total_tokens": "tokens", "tokens": ""}  # its columns; "" for another meaning
STEP_DIGITS, MOST = 9, 1e100  # digits of a step; values beyond that count as infinite
CARD_ROW = re.compile(r"^\| +(\S.*?) +\| +(.*?) +\|$", re.MULTILINE)


@dataclass(frozen=True)
class ReportedRun:
    """A run with all that a report shows.

    Args:
        run: Its settings and losses.
        columns: The finite values of each column of its metrics, with their steps.
        n_infinite: The number of values that are NaN or infinite.
    """

    run: RecordedRun
    columns: dict[str, Points]
    n_infinite: int

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def settings(self) -> dict[str, str]:
        return {name: shown(value) for name, value in self.run.settings.items()}

    @cached_property
    def result(self) -> Path:
        folders = [self.folder / name for name in ("final", "best")]
        return next((folder for folder in folders if (folder / LOCK).is_file()), folders[0])

    @cached_property
    def lock(self) -> Mapping[str, Any]:
        return as_table(attempt(read_lock, self.result))

    def locked(self, name: str) -> dict[str, str]:
        """A table of `run.lock` as text."""
        return {str(k): shown(v) for k, v in as_table(self.lock.get(name)).items()}

    @property
    def machine(self) -> dict[str, str]:
        return {"device name" if k == "name" else k: text for k, text in self.locked("machine").items()}

    @property
    def data(self) -> list[tuple[str, str]]:
        """The sources of rows, with their hashes."""
        found = self.lock.get("data")
        pairs = found if isinstance(found, list) else []
        return [(shown(pair[0]), shown(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2]

    @property
    def check(self) -> list[str]:
        found = self.lock.get("check")
        return [*map(shown, found)] if isinstance(found, list) else []

    @cached_property
    def recorded_examples(self) -> list[dict[str, Any]]:
        return attempt(read_examples, self.folder / EXAMPLES) or []

    @property
    def examples(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Prompts, each with the reference and the answers before and after training."""
        found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for line in self.recorded_examples:
            if "prompt" in line:
                answers = found[line["prompt"], line["reference"]]
                answers.append((f"after step {line['step']:,}" if line["step"] else "before training", line["answer"]))
        return [(prompt, [*answers, ("reference", text)]) for (prompt, text), answers in found.items()]

    @property
    def exact(self) -> Optional[str]:
        """How many answers were exact."""
        counts = [(line["exact"], line["rows"]) for line in self.recorded_examples if "exact" in line]
        return " → ".join(f"{exact:,}\xa0of\xa0{rows:,}" for exact, rows in counts) or None

    @cached_property
    def card(self) -> list[tuple[str, str]]:
        """The table about the training in the model card."""
        _, _, rest = (attempt(read_text, self.result / CARD) or "").partition(f"\n{TRAINING}\n")
        rows = CARD_ROW.findall(rest.partition("\n## ")[0])
        return [(key, value.replace("\\|", "|").replace("`", "")) for key, value in rows]

    @property
    def events(self) -> list[tuple[str, str]]:
        """What `litgpt ctl` did to the run so far, with the steps."""
        found = events_of(lines_until(self.folder / METRICS, ALL, ALL))
        return [(f"step {step:,}", text) for step, text in found if step <= self.run.curves.steps]

    def scores(self) -> dict[str, list[list[str]]]:
        """The rows of a table of what `litgpt evaluate` measured, by the name of the folder of the result."""
        files = [self.folder / RESULTS, *sorted(self.folder.glob(f"*/{RESULTS}"))]
        return {file.parent.parent.name: found for file in files if (found := read_scores(file))}


def read_run(path: Path) -> ReportedRun:
    """The run in a folder, or the one that a result belongs to. Raises `UserError` if there is none."""
    run = find_run(path)
    below = os.path.relpath(run.folder)
    if not below.startswith(".."):
        run = find_run(Path(below))
    return ReportedRun(run, *read_columns(run.folder))


def attempt(read: Any, file: Path) -> Any:
    """What `read` makes of a file; None if it is missing or damaged."""
    try:
        return read(file)
    except (UserError, OSError):
        return None


def as_table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else without_secrets(str(value))


def read_columns(folder: Path) -> tuple[dict[str, Points], int]:
    """The finite values of each column of the metrics, in the order of their steps, and the number of others."""
    files = [folder / METRICS, *sorted(folder.glob(LIGHTNING), key=lambda path: path.stat().st_mtime, reverse=True)]
    found: dict[str, Points] = defaultdict(list)
    n_infinite = 0
    with open(next(filter(Path.is_file, files)), newline="", encoding="utf-8", errors="replace") as f:
        names = f.readline(LINE).strip().split(",")
        if "total_tokens" in names:
            names = [LITGPT_NAMES.get(name, name) for name in names]
        for line in iter(lambda: f.readline(LINE), ""):
            values = line.strip().split(",")
            row = dict(zip(names, values))
            step = row.pop("step", "")
            if line[-1] != "\n" or not (step.isascii() and step.isdigit()) or len(step) > STEP_DIGITS:
                continue  # half-written
            for name, value in ((name, number(text)) for name, text in row.items() if name and text):
                if value is not None and abs(value) <= MOST:
                    found[name].append((int(step), value))
                n_infinite += value is not None and not abs(value) <= MOST
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}, n_infinite


def number(value: Any) -> Optional[float]:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def read_scores(file: Path) -> list[list[str]]:
    """Task, metric, value, that of the base, the difference, an interval, and the number of samples."""
    found = as_table(attempt(read_json, file))
    results, differences, counts = (as_table(found.get(name)) for name in ("results", "vs_base", "n-samples"))
    scores = []
    for task, values in ((task, as_table(values)) for task, values in results.items()):
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            own = as_table(as_table(differences.get(task)).get(key.removesuffix(",none")))
            base, difference, low, high, n = (number(own.get(k)) for k in ("base", "difference", "low", "high", "n"))
            error, interval = number(values.get(f"{metric}_stderr,{kind}")), ""
            if low is not None and high is not None:
                interval = f"{low:+.4g} to {high:+.4g}{' *' * (low > 0 or high < 0)}"
            elif error is not None:
                interval = f"± {1.96 * error:.4g} around the value"
            n = n or number(as_table(counts.get(task)).get("effective"))
            row = [digits(number(value)), digits(base), digits(difference, "+"), interval, f"{n:,.0f}" if n else ""]
            scores.append([task, key.removesuffix(",none"), *row])
    return scores


def digits(value: Optional[float], sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign},.6g}"
