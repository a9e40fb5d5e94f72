"""The screen of a run: tables, log lines, and a progress bar."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Optional

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from litgpt.errors import reason, remark

SECONDS = 5  # between log lines about one long operation
REFRESH = 0.1  # seconds between updates of a bar
MIN_COLUMNS = 40  # for a bar; terminals of unknown size may claim to be narrower


def gigabytes(n_bytes: Optional[int]) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes is not None else "-"


def percent(fraction: Optional[float], digits: int = 0) -> str:
    return f"{fraction:.{digits}%}" if fraction is not None else "-"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Output(Console):
    """A console that raises an error when its reader is gone, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("its reader has closed it")


class Screen:
    """The output of rank 0, if this is it (`active`). Steps are shown in a progress bar on a terminal and as lines
    elsewhere.

    If the output fails, the run goes on: the screen says so once on stderr and shows nothing more.
    """

    def __init__(self, active: bool) -> None:
        self.console = Output(quiet=not active, highlight=False, file=sys.stdout or io.StringIO())
        capable = self.console.is_terminal and not self.console.is_dumb_terminal
        self.interactive = capable and self.console.width >= MIN_COLUMNS
        if not self.interactive:
            self.console.width = 200  # files and pipes do not wrap lines
        self.bar: Optional[Progress] = None

    @contextmanager
    def tolerating_errors(self) -> Iterator[None]:
        """Silence the screen if the output fails: a closed pipe, a full disk, an odd terminal."""
        try:
            yield
        except Exception as e:
            if not self.console.quiet:
                self.console.quiet, self.interactive = True, False
                self.stop()  # or the bar would swallow the remark
                remark(f"Output failed; the run continues without it: {reason(e)}")
                if isinstance(e, OSError):  # what is left in its buffer would fail when Python exits
                    with suppress(OSError, ValueError):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())

    def say(self, text: str = "") -> None:
        with self.tolerating_errors():
            self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Print the rows that are not empty."""
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            if value:
                table.add_row(name, value)
        with self.tolerating_errors():
            self.console.print(table)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, Optional[int]], None]]:
        """Yield a function that shows a growing count and the total, if that is known: in a bar on a terminal,
        elsewhere in a line every few seconds."""
        line = Live(console=self.console, transient=True, auto_refresh=False, redirect_stderr=False)
        began = last = time.perf_counter()

        def show(count: int, total: Optional[int] = None) -> None:
            nonlocal last
            if time.perf_counter() - last < (REFRESH if self.interactive else SECONDS):
                return
            last = time.perf_counter()
            text = f"{what}: {count:,}"
            if total:
                left = (last - began) * max(0, total - count) / max(count, 1)
                text += f" of {total:,}, {duration(left)} left"
            if not self.interactive:
                self.say(text)
                return
            grid = Table.grid(padding=(0, 1))
            grid.add_row(*([ProgressBar(total, min(count, total), width=30)] if total else []), text)
            with self.tolerating_errors():
                line.start()
                line.update(grid, refresh=True)

        try:
            yield show
        finally:
            with self.tolerating_errors():
                line.stop()

    def start(self, done: float) -> None:
        """Start to show steps, with this fraction of the run already done."""
        self.began, self.done_before = time.perf_counter(), done
        if self.interactive and not self.console.quiet:
            columns = (BarColumn(), TextColumn("{task.description}"))
            with self.tolerating_errors():
                self.bar = Progress(*columns, console=self.console, auto_refresh=False)
                self.task, self.refreshed = self.bar.add_task("", total=1.0), -REFRESH
                self.bar.update(self.task, completed=done)
                self.bar.start()

    def step(self, done: float, parts: Sequence[str], details: Sequence[str] = ()) -> None:
        """Show a finished step and the time left, in the bar or as a line. `done` is the fraction of the run that is
        done; a narrow terminal truncates the `details`."""
        left = (time.perf_counter() - self.began) / max(done - self.done_before, 1e-9) * (1 - done)
        parts = [*parts, f"{duration(left)} left", *details]
        if self.bar is None:
            self.say(" | ".join(parts))
            return
        with self.tolerating_errors():
            now = time.perf_counter()
            is_due = now - self.refreshed >= REFRESH  # not by rich's thread, whose errors nobody would catch
            self.refreshed = now if is_due else self.refreshed
            self.bar.update(self.task, completed=done, description="  ".join(parts), refresh=is_due)

    def stop(self) -> None:
        bar, self.bar = self.bar, None
        if bar is not None:
            with self.tolerating_errors():
                bar.stop()
