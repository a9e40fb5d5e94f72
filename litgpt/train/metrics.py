"""The numbers of a run: `metrics.csv`, another logger, and `loss.png` where matplotlib is installed."""

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

from litgpt.errors import reason, remark
from litgpt.storage.outputs import put_single, write_single
from litgpt.train.loggers import Logger

METRICS = "metrics.csv"
FIELDS = ("step", "epoch", "loss", "lr", "val_loss", "tokens", "seconds", "tokens_per_s", "mfu", "peak_memory")
LINE = 1000  # characters of a line, at most
WHOLE = re.compile(rf"[0-9]{{1,9}}(,(-?[0-9.]+(e[-+]?[0-9]+)?|nan|-?inf)?){{{len(FIELDS) - 1}}}\r?\n")


class Metrics:
    """Writes a line as soon as there is one. Leaving it as a context manager closes everything.

    A line that cannot be written, for lack of room for example, waits for the next one, which may find room again. A
    checkpoint is not written without the lines before it: a run that goes on from it has them.

    Args:
        path: The file; None to write nothing (on all ranks but the first).
        carried: Lines of the part of the run that came before, see `lines_until`.
        logger: Gets the same numbers. That it fails does not end the run: it is said, once.
    """

    def __init__(
        self, path: Optional[Path], logger: Optional[Logger] = None, carried: Sequence[dict[str, str]] = ()
    ) -> None:
        self.logger = logger
        if path:
            begin = io.StringIO()
            writer = csv.DictWriter(begin, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(carried)
            write_single(path, begin.getvalue())  # at once: a kill in between must not lose the lines
        self.path, self.waiting, self.said = path, b"", False
        self.file = open(path, "ab", buffering=0) if path else None  # noqa: SIM115

    def write(self, step: int, **values: Any) -> None:
        """One line. Fields: losses in nats per token, tokens and seconds since the start, memory in bytes."""
        if self.file:
            line = io.StringIO()
            csv.DictWriter(line, FIELDS, lineterminator="\n").writerow({"step": step, **values})
            self.waiting += line.getvalue().encode()
            self.try_to_write()
        self.tell_logger("write", step, {k: float(v) for k, v in values.items() if v is not None})

    def write_waiting(self) -> None:
        while self.file and self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def try_to_write(self) -> None:
        try:
            self.write_waiting()
        except OSError as e:
            if not self.said:
                remark(f"{self.path} cannot be written and waits: {reason(e)}")
                self.said = True

    def flush(self) -> None:
        """Have the lines on the disk, before a checkpoint that relies on them. Raises `OSError` if that cannot be."""
        self.write_waiting()
        if self.file:
            os.fsync(self.file.fileno())

    def tell_logger(self, what: str, *args: Any) -> None:
        if self.logger is None:
            return
        try:
            getattr(self.logger, what)(*args)
        except Exception as e:  # of a library or of the network: any kind
            name, self.logger = type(self.logger).__name__, None
            remark(f"{name} failed and gets no more numbers: {reason(e)}")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if self.file:
            self.try_to_write()
            self.file.close()
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.tell_logger("close", "finished" if kind is None else "interrupted" if interrupted else "failed")


def lines_until(path: Path, step: int, judged: int) -> list[dict[str, str]]:
    """The lines of a metrics file that a checkpoint knows of: up to its step, and those of validations up to the step
    that was judged last. One that was cut short is none."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        lines = [line.strip().split(",") for line in iter(lambda: f.readline(LINE), "") if WHOLE.fullmatch(line)]
    rows = [dict(zip(FIELDS, line)) for line in lines]
    return [row for row in rows if int(row["step"]) <= (judged if row["val_loss"] else step)]


def plot(metrics: Path, image: Path) -> bool:
    """Draw the losses of a metrics file. Returns whether matplotlib was there to do it."""
    backend = os.environ.get("MPLBACKEND", "").removeprefix("module://").partition(".")[0]
    if backend.endswith("_inline") and find_spec(backend) is None:
        del os.environ["MPLBACKEND"]  # that of a notebook, which has started a Python that knows nothing of it
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        if e.name != "matplotlib":
            raise
        return False
    with open(metrics, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(int(r["step"]), float(r[name])) for r in rows if r[name] and math.isfinite(float(r[name]))]
        if points:
            axes.plot(*zip(*points), style, label={"loss": "training", "val_loss": "validation"}[name])
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    temporary = image.with_name(f".{image.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    put_single(temporary, image)
    return True
