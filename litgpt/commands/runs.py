"""`litgpt runs`, `litgpt runs watch`, and `litgpt runs diff`"""

import csv as csv_files
import io
import json as json_text
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from litgpt.cli.help_texts import IMPORTANT
from litgpt.errors import UserError, brief, remark
from litgpt.storage.outputs import check_file, write_single
from litgpt.train.metrics import thinned
from litgpt.train.progress import Output, duration
from litgpt.train.resume.state import FREE
from litgpt.train.runs import Curves, RecordedRun, differing, facts, find_run, find_runs, plot_runs

OUT = Path("out")
PLOTS = (".png", ".svg")
SECONDS = 2  # between updates of `watch`
GAP = 2  # columns of the terminal between those of a table
LINES = 20  # of the curves in `diff`
NAMED = 20  # equal entries that are named
DECIMALS = "{:.4f}".format  # of losses and scores
STYLES = {"running": "green", "failed": "red"}


def main(
    dirs: list[Path] = [OUT],  # noqa: B006
    csv: Optional[Path] = None,
    json: bool = False,
    plot: Optional[Path] = None,
    overwrite: bool = False,
) -> None:
    """List the runs below folders, best validation loss first, with the settings in which they differ.

    A run is running, finished, stopped (it can be resumed), or failed (it has no checkpoint). Losses are in nats per
    target token. What does not fit into the terminal is in --csv and --json.

    Args:
        dirs: Folders of runs, or folders that contain them.
        csv: Write the table to a CSV file, with all columns.
        json: Print the runs as JSON, with all of their settings, instead of the table.
        plot: Plot the losses of all runs over each other, to a PNG or SVG file.
        overwrite: Replace files that litgpt did not write.
    """
    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise UserError(f"--plot {plot}: the name must end with {' or '.join(PLOTS)}.")
    for option, file in (("--csv", csv), ("--plot", plot)):
        if file is not None:
            check_file(file, overwrite, option)
            file.parent.mkdir(parents=True, exist_ok=True)
    runs, unreadable = find_runs(folder for folder in dirs if folder.is_dir())
    for problem in unreadable:
        remark(f"Cannot read {printable(problem)}")
    if missing := [folder for folder in dirs if not folder.is_dir()] or dirs * (not runs):
        raise none_below(missing)
    if csv is not None:
        write_single(csv, as_csv(runs))
    if plot is not None:
        plot_runs(runs, short_names(runs)[1], plot)
    if json:
        print(json_text.dumps([as_json(run) for run in runs], indent=2, ensure_ascii=False))
    else:
        console = make_console()
        console.print(overview(runs, console.width))


def watch(dirs: list[Path] = [OUT]) -> None:  # noqa: B006
    """Show the table of `litgpt runs`, updated every 2 seconds until Ctrl-C. Running runs come first.

    Without a terminal, it is printed once.

    Args:
        dirs: Folders of runs, or folders that contain them.
    """
    console = make_console()
    if not console.is_interactive:
        main(dirs)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            runs = sorted(find_runs(dirs)[0], key=lambda run: run.state != "running")
            live.update(overview(runs, console.width) if runs else Text(none_below(dirs).message), refresh=True)
            time.sleep(SECONDS)


def diff(run: Path, other: Path) -> None:
    """Show how two runs differ: settings, data, versions, results, and losses side by side.

    Args:
        run: The folder of a run, or of its result.
        other: The folder of the other run.
    """
    console, both = make_console(), [find_run(run), find_run(other)]
    for letter, one in zip("AB", both):
        console.print(f"{letter}  {from_here(str(one.folder))} ({one.state})", soft_wrap=True)
    a, b = (one.settings for one in both)
    compare(console, "settings", *({n: as_text(one[n]) for n in a if n in b} for one in (a, b)))
    for letter, own, names in (("A", a, [n for n in a if n not in b]), ("B", b, [n for n in b if n not in a])):
        if names:
            console.print(f"settings, only in {letter}: {named(names, len(own))}")
    for title, *found in zip(("data", "versions and machine"), *(facts(one) for one in both)):
        compare(console, title, *found)
    compare(console, "results", *(shown_results(one) for one in both))
    console.print(side_by_side(*(one.curves for one in both)))


def make_console() -> Console:
    return Output(highlight=False, markup=False, emoji=False)


def make_table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))


def none_below(dirs: Sequence[Path]) -> UserError:
    return UserError(
        f"There are no runs in {', '.join(map(printable, dirs))}.",
        ["elsewhere: litgpt runs FOLDER", "start one: litgpt finetune lora MODEL --data FILE"],
    )


# the table


def overview(runs: Sequence[RecordedRun], width: int) -> RenderableType:
    """A table of the columns that fit into the width, most important first, and a line that names the others."""
    place, names = short_names(runs)
    columns = [column for column in all_columns(runs, names) if any(column.cells)]
    columns[0].limit = min(40, max(10, width // 3))
    left, shown = width + GAP, list[Column]()
    for column in sorted(columns, key=lambda column: column.rank):
        if column.rank < 3 or column.width <= left:
            shown.append(column)
            left -= column.width
    table = make_table()
    for column in (kept := [column for column in columns if column in shown]):
        table.add_column(
            column.name, justify=column.justify, overflow="fold", max_width=column.limit, no_wrap=column.rank in (1, 2)
        )
    for i in range(len(runs)):
        table.add_row(*(Text(column.cells[i], STYLES.get(column.cells[i], "")) for column in kept))
    count = f"{len(runs):,} run{'s' * (len(runs) > 1)} in {place}"
    lines: list[RenderableType] = [Text(f"{count}; validation loss: start, best, and last"), table]
    if hidden := [column.name for column in columns if column not in shown]:
        lines.append(Text(f"Not shown: {', '.join(hidden)}. For all columns: --csv FILE"))
    return Group(*lines)


@dataclass
class Column:
    """A column of the table. Those of a low rank are shown first."""

    name: str
    rank: int
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"
    limit: int = 24  # of its width

    @property
    def width(self) -> int:
        return min(self.limit, max(len(cell) for cell in (self.name, *self.cells))) + GAP


def all_columns(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Column]:
    """The columns from left to right. Ranks: run, state, best loss, three settings, then results and settings by
    turns."""
    important = {name: i for i, name in enumerate(("method", *IMPORTANT))}
    settings = sorted(differing(runs), key=lambda name: (bool(FREE.match(name)), important.get(name, len(important))))
    last_parts = [name.rpartition(".")[2] for name in settings]
    heads = [part if last_parts.count(part) == 1 else name for name, part in zip(settings, last_parts)]
    scores = dict.fromkeys(name for run in runs for name in run.scores)
    results = [run.fields() for run in runs]

    def column(name: str, rank: int, key: str, shown: Callable[[Any], str] = "{:,}".format) -> Column:
        return Column(name, rank, ["" if row[key] is None else shown(row[key]) for row in results])

    return [
        Column("run", 0, names, "left"),
        Column("state", 1, [run.state for run in runs], "left"),
        *(
            Column(
                head,
                20 if FREE.match(name) else 3 + i if i < 3 else 3 + 2 * i,  # FREE: no influence on the result
                short_values([run.settings.get(name) for run in runs]),
                "left",
            )
            for i, (name, head) in enumerate(zip(settings, heads))
        ),
        column("start", 8, "val_loss_start", DECIMALS),
        column("best", 2, "val_loss_best", DECIMALS),
        column("at step", 6, "val_loss_best_step"),
        column("last", 7, "val_loss_last", DECIMALS),
        column("reward accuracy", 6, "reward_accuracy", "{:.1%}".format),
        *(
            Column(name, 8 + 2 * i, [DECIMALS(run.scores[name]) if name in run.scores else "" for run in runs])
            for i, name in enumerate(scores)
        ),
        column("steps", 10, "steps"),
        column("tokens", 14, "tokens", lambda n: f"{n / 1e6:,.1f} M" if n >= 1e6 else f"{n:,}"),
        column("time", 12, "seconds", duration),
        column("GB", 13, "peak_memory", lambda n: f"{n / 1e9:.2f}"),
    ]


def short_names(runs: Sequence[RecordedRun]) -> tuple[str, list[str]]:
    """The folder that has all runs, and their paths in it."""
    paths = [os.path.abspath(run.folder) for run in runs]
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    return from_here(top), [printable(os.path.relpath(path, top)) for path in paths]


def from_here(path: str) -> str:
    """A path, relative to the current folder if it is in there."""
    here = os.path.relpath(path)
    return printable(path if here.startswith("..") else here)


def short_values(values: Sequence[Any]) -> list[str]:
    """The values of a setting as text, paths by their names if these differ where the paths do."""
    texts = ["" if value is None else as_text(value) for value in values]
    short = [", ".join(Path(part).name or part for part in text.split(", ")) for text in texts]
    shown = short if len({*short}) == len({*texts}) else texts
    return [text if len(text) <= 48 else f"{text[:45]}..." for text in shown]


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return printable(value) if isinstance(value, str) else brief(value)


def printable(value: object) -> str:
    """A text without control characters, which a name may have."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


# files


def as_json(run: RecordedRun) -> dict[str, Any]:
    results = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value  # which JSON does not have
        for name, value in run.fields().items()
    }
    return {"run": printable(run.folder), "state": run.state, **results, "scores": run.scores, "settings": run.settings}


def as_csv(runs: Sequence[RecordedRun]) -> str:
    settings = differing(runs)
    rows = [
        {"run": printable(run.folder), "state": run.state}
        | {name: as_text(value) for name in settings if (value := run.settings.get(name)) is not None}
        | run.fields()
        | run.scores
        for run in runs
    ]
    scores = dict.fromkeys(name for run in runs for name in run.scores)
    out = io.StringIO()
    writer = csv_files.DictWriter(out, ["run", "state", *settings, *runs[0].fields(), *scores], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# differences


def compare(console: Console, title: str, a: dict[str, str], b: dict[str, str]) -> None:
    """Print what differs as a table, and what is equal in one line."""
    names = [*a, *(name for name in b if name not in a)]
    different = [name for name in names if a.get(name) != b.get(name)]
    equal = [name for name in names if name not in different]
    if different:
        table = make_table()
        for column in (title, "A", "B"):
            table.add_column(column, overflow="fold")
        for name in different:
            table.add_row(*(Text(cell) for cell in (name, a.get(name, "not recorded"), b.get(name, "not recorded"))))
        console.print(table)
    if equal:
        console.print(f"{title}, equal: {named(equal, len(names))}")
    if not names:
        console.print(f"{title}: not recorded")


def named(names: Sequence[str], total: int) -> str:
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} of {total}"


def shown_results(run: RecordedRun) -> dict[str, str]:
    return {column.name: column.cells[0] for column in all_columns([run], [""])[2:] if column.cells[0]}


def side_by_side(a: Curves, b: Curves) -> RenderableType:
    """The losses of two runs at the steps of their validations, filled up with other steps."""
    if (a.train, a.val) == (b.train, b.val):
        return Text(f"losses: equal in all {a.steps:,} steps")
    curves = [dict(points) for points in (a.train, b.train, a.val, b.val)]
    validated = sorted({*curves[2], *curves[3]})
    others = sorted({*curves[0], *curves[1]} - {*validated})
    steps = thinned(validated, LINES)
    steps = sorted([*steps, *(thinned(others, n) if (n := LINES - len(steps)) > 1 else [])])
    table = make_table()
    for name in ("step", "loss A", "loss B", "validation A", "validation B"):
        table.add_column(name, justify="right")
    for step in steps:
        table.add_row(f"{step:,}", *(DECIMALS(curve[step]) if step in curve else "" for curve in curves))
    return table
