"""The HTML of a report. The template escapes all texts, and control characters are shown as codes."""

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Optional

from jinja2 import Environment, StrictUndefined, Template

from litgpt import __version__
from litgpt.errors import remark
from litgpt.storage.outputs import is_ours, write_single
from litgpt.train.progress import duration, gigabytes
from litgpt.train.resume.folder import HYPERPARAMETERS, REPORT
from litgpt.train.run_report.charts import CHARTED, COLORS, DASHES, Chart, Line, envelope
from litgpt.train.run_report.recorded import ReportedRun, digits, read_run, shown
from litgpt.train.runs import saved_state

POINTS, ALL_POINTS, FEWEST = 1000, 4000, 100  # of a line, of the lines of all runs in a chart, and of each at least
CHARTS = (  # columns and their names, the title, the factor, whether the axis begins at zero
    ({"loss": "training", "val_loss": "validation"}, "Loss", 1.0, False),
    ({"lr": ""}, "Learning rate", 1.0, True),
    ({"rewards/margins": "training", "val_rewards/margins": "validation"}, "Reward margin", 1.0, False),
    ({"rewards/accuracies": "training", "val_rewards/accuracies": "validation"}, "Reward accuracy", 1.0, True),
    ({"tokens_per_s": ""}, "Tokens per second", 1.0, True),
    ({"peak_memory": ""}, "Peak memory (GB)", 1e-9, True),
)
EXAMPLES = 50  # of a run that are shown
ABOUT_DATA = ("data", "training rows", "validation rows")  # in a model card
Table = tuple[str, list[str], list[list[str]]]  # title, head, and rows
INVISIBLE = r"\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # with marks of direction
CONTROL = re.compile(rf"[{INVISIBLE}\ud800-\udfff\ufffe\uffff]")


def visible(value: Any) -> Any:
    """A text whose control characters, marks that change its direction, and invalid characters are shown as codes."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return CONTROL.sub(
        lambda found: f"\\u{ord(found[0]):04x}" if ord(found[0]) > 255 else f"\\x{ord(found[0]):02x}", value
    )


@cache
def template() -> Template:
    environment = Environment(
        autoescape=True, finalize=visible, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def render(runs: Sequence[ReportedRun]) -> str:
    """The report of one or more runs."""
    names = run_names(runs)
    several = len(runs) > 1
    charts = [chart for row in CHARTS if (chart := make_chart(runs[:CHARTED], names, *row)) is not None]
    values: dict[str, Any] = {
        "title": f"{len(runs)} runs" if several else names[0],
        "result": best_of(runs, names) if several else outcome(runs[0]),
        "several": several,
        "tables": comparison(runs, names) if several else [],
        "charts": charts,
        "left_out": max(0, len(runs) - CHARTED),
        "sections": [section(run, name) for run, name in zip(runs, names)],
        "per_token": not any("rewards/margins" in run.columns for run in runs),
        "version": __version__,
    }
    return template().render(values)


def write_report(folder: Path) -> Optional[Path]:
    """Write the report of a run that has ended into its folder. One that is not ours, or was changed, is kept."""
    out, run = folder / REPORT, read_run(folder)
    if out.exists() and not is_ours(out):
        remark(f"Kept {out}, which was changed. To write a report elsewhere: litgpt report {quoted(folder)} --out FILE")
        return None
    write_single(out, render([replace(run, run=replace(run.run, state=saved_state(folder)))]))
    return out


def run_names(runs: Sequence[ReportedRun]) -> list[str]:
    """The names of their folders, or if these are not different, their paths."""
    names = [run.folder.resolve().name or str(run.folder) for run in runs]
    return names if len({*names}) == len(names) else [str(run.folder) for run in runs]


def make_chart(
    runs: Sequence[ReportedRun], names: Sequence[str], columns: dict[str, str], title: str, factor: float, zero: bool
) -> Optional[Chart]:
    most = max(FEWEST, min(POINTS, ALL_POINTS // len(runs)))
    lines = []
    for i, (run, name) in enumerate(zip(runs, names)):
        for j, (column, kind) in enumerate(columns.items()):
            points = [(step, value * factor) for step, value in envelope(run.columns.get(column, []), most)]
            several = len(runs) > 1
            label = " ".join(filter(None, [name * several, kind])) or title
            color, dash = (i % COLORS, DASHES[i // COLORS]) if several else (j, "")
            if points:
                lines.append(Line(label, color, kind or "training", points, dash))
    return Chart(title, lines, zero) if lines else None


# results


def outcome(run: ReportedRun) -> str:
    """The result of a run in one line."""
    found, train = run.run.fields(), run.columns.get("loss", [])
    if run.run.best is not None:
        before = f", {found['val_loss_start']:.4f} before training" if found["val_loss_start"] is not None else ""
        step = f"at step {found['val_loss_best_step']:,}"
        return f"Best validation loss {found['val_loss_best']:.4f} {step}, last {found['val_loss_last']:.4f}{before}."
    return f"Training loss {train[-1][1]:.4f} at step {train[-1][0]:,}." if train else "No losses are recorded."


def best_of(runs: Sequence[ReportedRun], names: Sequence[str]) -> str:
    found = [(run.run.best[1], run.run.best[0], name) for run, name in zip(runs, names) if run.run.best is not None]
    if not found:
        return "None of the runs has a validation loss."
    loss, step, name = min(found)
    return f"Best validation loss: {loss:.4f}, {name} at step {step:,}."


def facts(run: ReportedRun) -> dict[str, str]:
    """The numbers of a run, as far as they are recorded."""
    found, columns = run.run.fields(), run.columns
    rows: tuple[tuple[str, Any, Callable[[Any], str]], ...] = (
        ("validation loss before", found["val_loss_start"], "{:.4f}".format),
        ("best validation loss", found["val_loss_best"], "{:.4f}".format),
        ("at step", found["val_loss_best_step"], "{:,}".format),
        ("last validation loss", found["val_loss_last"], "{:.4f}".format),
        ("last training loss", columns["loss"][-1][1] if "loss" in columns else None, "{:.4f}".format),
        ("reward accuracy", found["reward_accuracy"], "{:.1%}".format),
        ("exact answers", run.exact, str),
        ("steps", found["steps"], "{:,}".format),
        ("epochs", columns["epoch"][-1][1] if "epoch" in columns else None, "{:.4g}".format),
        ("tokens", found["tokens"], "{:,}".format),
        ("time", found["seconds"], duration),
        ("tokens per second", median(v for _, v in columns.get("tokens_per_s", [(0, 0)])) or None, "{:,.0f}".format),
        ("peak memory", found["peak_memory"], gigabytes),
        ("NaN or infinite values", run.n_infinite or None, "{:,}, not in the charts".format),
    )
    return {"state": run.run.state, **{name: form(value) for name, value, form in rows if value is not None}}


# what else is recorded


def section(run: ReportedRun, name: str) -> dict[str, Any]:
    command = shown(run.lock.get("command") or "")
    hashes = [(kind, run.locked(kind)) for kind in ("model", "adapter")]
    return {
        "name": name,
        "outcome": outcome(run),
        "facts": facts(run),
        "scores": run.scores(),
        "events": run.events,
        "command": f"litgpt {command.replace('_', ' ', 1)} --config {quoted(run.result / HYPERPARAMETERS)}",
        "rerun": f"litgpt rerun {quoted(run.folder)}" if command else "",
        "card": [row for row in run.card if row[0] not in ABOUT_DATA],
        "data": data_rows(run),
        "examples": run.examples[:EXAMPLES],
        "more_examples": len(run.examples[EXAMPLES:]),
        "versions": run.locked("versions"),
        "machine": run.machine,
        "hashes": [(f"{kind} {file}", digest) for kind, files in hashes for file, digest in files.items()],
        "settings": run.settings,
    }


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def data_rows(run: ReportedRun) -> list[tuple[str, str]]:
    """The files of rows, what the model card says about them, and the hashes of the rows and of their order."""
    about = [row for row in run.card if row[0] in ABOUT_DATA]
    hashes = [(path, f"hash of its rows {digest}") for path, digest in run.data]
    names = {"rows": "hash of all training rows", "order": "hash of their order"}
    check = [("check", text) for text in run.check]
    return [
        *about,
        *check,
        *hashes,
        *((text, shown(run.lock[name])) for name, text in names.items() if run.lock.get(name)),
    ]


def comparison(runs: Sequence[ReportedRun], names: Sequence[str]) -> list[Table]:
    """A table of the results, and one of the settings, data, files, and versions that differ, as far as recorded."""
    results = [facts(run) | {name: digits(value) for name, value in run.run.scores.items()} for run in runs]
    columns = [*merged(results)]
    rows = [[name, *(own.get(column, "") for column in columns)] for name, own in zip(names, results)]
    differing = [
        [name, *(own.get(name, "") for own in tables)]
        for tables in zip(*map(compared, runs))
        for name in merged(tables)
        if len({own.get(name) for own in tables if own}) > 1
    ]
    found: list[Table] = [("Results", ["run", *columns], rows)]
    return found + [("What differs", ["", *names], differing)] * bool(differing)


def compared(run: ReportedRun) -> tuple[dict[str, str], ...]:
    """What is compared with other runs that have recorded it."""
    hashes = {f"{kind} {name}": digest for kind in ("model", "adapter") for name, digest in run.locked(kind).items()}
    hashes |= {f"rows of {path}": digest for path, digest in run.data}
    versions = {f"version of {name}": text for name, text in run.locked("versions").items()}
    return run.settings, {name: digest[:12] for name, digest in hashes.items()}, versions | run.machine


def merged(tables: Iterable[dict[str, str]]) -> dict[str, None]:
    """The names in any of the tables, in their order."""
    return {name: None for table in tables for name in table}
