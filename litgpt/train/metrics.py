"""The metrics of a run: `metrics.csv`, a logger, and `loss.png`, a plot of the losses if matplotlib is installed."""

import csv
import io
import math
import os
import re
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, TypeVar

from litgpt.errors import reason, remark
from litgpt.storage.outputs import put_single, write_single
from litgpt.train.loggers import Logger

METRICS, PLOT = "metrics.csv", "loss.png"
FIELDS = ("step", "epoch", "loss", "lr", "val_loss", "tokens", "seconds", "tokens_per_s", "mfu", "peak_memory")
EVENT, EVENTS = "event", r"lr [0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?|eval|sample|save|stop"  # the last column, what it has
REPEATED = ("lr ", "eval")  # events that change the result, so that a resumed run repeats them
Event = tuple[int, str]  # the step after which it happened
ALL = 10**9  # more than a run has steps
LINE = 1000  # maximum characters of a line
SECONDS, SHARE = 10, 0.05  # of the time before the end: nothing is plotted, and what plotting may take after that
POINTS = 2000  # maximum number of points of a line of the plot
T = TypeVar("T")
COMPLETE_LINE = re.compile(rf"[0-9]{{1,9}}(,(-?[0-9.]+(e[-+]?[0-9]+)?|nan|-?inf)?)*(,({EVENTS}))?\r?\n")


class Metrics:
    """Writes each line at once. Closes the file and the logger when it is left as a context manager.

    The losses are plotted after a validation, unless plotting would take too much of the time, and at the end, however
    the run ends. `plotted` tells whether there is a plot.

    A line that cannot be written, for example because the disk is full, waits for the next one. Without a path, on all
    ranks but the first, nothing is written. The first error of the logger is reported and does not end the run.
    `carried` are lines of an earlier part of the run, see `lines_until`; `events` are those in them. `more` are columns
    besides `FIELDS`.
    """

    def __init__(
        self,
        path: Optional[Path],
        logger: Optional[Logger] = None,
        carried: Sequence[dict[str, str]] = (),
        more: Sequence[str] = (),
    ) -> None:
        self.logger, self.fields, self.events = logger, [*FIELDS, *more, EVENT], events_of(carried)
        if path:
            beginning = io.StringIO()
            writer = csv.DictWriter(beginning, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(carried)
            write_single(path, beginning.getvalue())  # atomically: a kill must not lose the carried lines
        self.path, self.waiting, self.has_failed = path, b"", False
        self.file = open(path, "ab", buffering=0) if path else None  # noqa: SIM115
        self.plotted, self.next_plot = False, time.perf_counter() + SECONDS

    def write(self, step: int, **values: Any) -> None:
        """Write one line. Losses are in nats per token, tokens and seconds count from the start, memory is in bytes."""
        self.write_line(step=step, **values)
        self.call_logger("write", step, {k: float(v) for k, v in values.items() if v is not None})
        if "val_loss" in values and time.perf_counter() >= self.next_plot:
            self.plot()

    def write_event(self, step: int, text: str) -> None:
        self.write_line(step=step, **{EVENT: text})

    def write_line(self, **values: Any) -> None:
        if self.file:
            line = io.StringIO()
            csv.DictWriter(line, self.fields, lineterminator="\n").writerow(values)
            self.waiting += line.getvalue().encode()
            self.try_to_write()

    def write_waiting(self) -> None:
        while self.file and self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def try_to_write(self) -> None:
        try:
            self.write_waiting()
        except OSError as e:
            if not self.has_failed:
                remark(f"Cannot write {self.path}; retrying at the next step: {reason(e)}")
                self.has_failed = True

    def flush(self) -> None:
        """Write all lines to the disk, before a checkpoint that relies on them. Raises `OSError` if that fails."""
        self.write_waiting()
        if self.file:
            os.fsync(self.file.fileno())

    def call_logger(self, method: str, *args: Any) -> None:
        if self.logger is None:
            return
        try:
            getattr(self.logger, method)(*args)
        except Exception as e:  # loggers raise anything
            name, self.logger = type(self.logger).__name__, None
            remark(f"{name} failed and receives no more metrics: {reason(e)}")

    def plot(self, reports: bool = True) -> None:
        """Plot the losses. If that fails, say so if `reports`, and plot again only at the end."""
        if self.path is None:
            return
        began = time.perf_counter()
        try:
            self.plotted = plot(self.path, self.path.with_name(PLOT))
            now = time.perf_counter()
            self.next_plot = now + (now - began) / SHARE
        except Exception as e:  # matplotlib raises anything
            self.next_plot = math.inf
            if reports:
                remark(f"Cannot plot {PLOT}: {reason(e)}")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *error: Any) -> None:
        if self.file:
            self.try_to_write()
            self.file.close()
            self.plot(reports=kind is None)  # else an error is reported already
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.call_logger("close", "finished" if kind is None else "interrupted" if interrupted else "failed")


def lines_until(path: Path, step: int, last_eval_step: int) -> list[dict[str, str]]:
    """The complete lines of a metrics file up to a step, its validations up to the last one before a checkpoint, and
    all of its events that a resumed run repeats."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        fields = f.readline(LINE).strip().split(",")
        lines = [
            line.strip().split(",") for line in iter(lambda: f.readline(LINE), "") if COMPLETE_LINE.fullmatch(line)
        ]
    fields = fields if tuple(fields[: len(FIELDS)]) == FIELDS else [*FIELDS]
    rows = [dict(zip(fields, line)) for line in lines if len(line) == len(fields)]
    return [
        row
        for row in rows
        if int(row["step"]) <= (last_eval_step if row["val_loss"] else step) or row.get(EVENT, "").startswith(REPEATED)
    ]


def events_of(rows: Iterable[dict[str, str]]) -> list[Event]:
    """The events in lines of metrics, in the order of their steps."""
    return timeline((int(row["step"]), row[EVENT]) for row in rows if row.get(EVENT))


def timeline(events: Iterable[Event]) -> list[Event]:
    """Events in the order of their steps. A learning rate that was recorded later but for an earlier step, because the
    run went back to a checkpoint, replaces those that were still to come."""
    found: list[Event] = []
    for step, text in events:
        found = [e for e in found if e[0] <= step or not (text[:2] == e[1][:2] == "lr")] + [(step, text)]
    return sorted(found, key=lambda event: event[0])


def is_event(value: Any) -> bool:
    """Whether a value from a file is an `Event`."""
    return (
        isinstance(value, (list, tuple))
        and [type(part) for part in value] == [int, str]
        and re.fullmatch(EVENTS, value[1]) is not None
    )


def figure_class() -> Optional[type]:
    """That of matplotlib; None if it is not installed."""
    backend = os.environ.get("MPLBACKEND", "").removeprefix("module://").partition(".")[0]
    if backend.endswith("_inline") and find_spec(backend) is None:
        del os.environ["MPLBACKEND"]  # inherited from a notebook, whose backend is not installed here
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        if e.name != "matplotlib":
            raise
        return None
    return Figure


def thinned(points: Sequence[T], n: int) -> list[T]:
    """At most `n` of the points, evenly spaced, with the first and the last."""
    return [*points[: -1 : max(1, math.ceil((len(points) - 1) / (n - 1)))], *points[-1:]]


def save_figure(figure: Any, image: Path) -> None:
    """Save a figure atomically, in the format that the name ends with, and record the file."""
    temporary = image.with_name(f".{image.name}.tmp")
    try:
        figure.savefig(temporary, dpi=120, format=image.suffix[1:].lower())
        put_single(temporary, image)
    finally:
        temporary.unlink(missing_ok=True)


def plot(metrics: Path, image: Path) -> bool:
    """Plot the losses of a metrics file. Returns False if it has none or if matplotlib is not installed."""
    make_figure = figure_class()
    if make_figure is None:
        return False
    with open(metrics, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    if not rows:
        return False
    pictures = {"loss": "loss (nats per token)"}
    if "rewards/margins" in rows[0]:
        pictures = {"loss": "loss", "rewards/margins": "reward margin"}
    figure = make_figure(figsize=(7, 4 * len(pictures)), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(len(pictures), squeeze=False)[:, 0], pictures.items()):
        for column, style, label in ((name, "-", "training"), (f"val_{name}", "o-", "validation")):
            found = [(int(row["step"]), row[column]) for row in rows if row[column]]
            points = [(step, float(value)) for step, value in found if math.isfinite(float(value))]
            if points:
                axes.plot(*zip(*thinned(points, POINTS)), style, label=label)
        axes.set(xlabel="step", ylabel=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save_figure(figure, image)
    return True
