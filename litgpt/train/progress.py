"""What a run shows on the screen."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Optional

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from litgpt.errors import reason, remark

SECONDS = 5  # between two lines about something that takes long
REFRESH = 0.1  # seconds between two pictures of a bar
NARROW = 40  # columns: less has no place for a bar, or is what a terminal says that does not know


def gigabytes(n_bytes: Optional[int]) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes is not None else "-"


def percent(share: Optional[float], digits: int = 0) -> str:
    return f"{share:.{digits}%}" if share is not None else "-"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Output(Console):
    """rich's, which ends the process when whoever read its output is gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("nobody reads it any more")


class Screen:
    """Rank 0's output: tables at the start and the end, and between them a progress bar, or plain lines where the
    output is no terminal. What cannot be shown does not end the run: that is said once, and then nothing more is shown.

    Args:
        active: Whether this process prints at all.
    """

    def __init__(self, active: bool) -> None:
        self.console = Output(quiet=not active, highlight=False, file=sys.stdout or io.StringIO())
        able = self.console.is_terminal and not self.console.is_dumb_terminal
        self.draws = able and self.console.width >= NARROW
        if not self.draws:
            self.console.width = 200  # a file or a pipe has no edge to wrap at
        self.bar: Optional[Progress] = None

    @contextmanager
    def spared(self) -> Iterator[None]:
        """The run is spared what the output raises: no reader any more, a full disk, an odd terminal."""
        try:
            yield
        except Exception as e:
            if not self.console.quiet:
                self.console.quiet, self.draws = True, False
                self.stop()  # or a bar would swallow the remark
                remark(f"the output ends here and the run goes on: {reason(e)}")
                if isinstance(e, OSError):  # what is left in its buffer would fail when Python ends
                    with suppress(OSError, ValueError):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())

    def say(self, text: str = "") -> None:
        with self.spared():
            self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        with self.spared():
            self.console.print(table)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], None]]:
        """Show a number that grows while it is told: in place on a terminal, elsewhere as a line every few seconds."""
        line = Live(console=self.console, transient=True, auto_refresh=False, redirect_stderr=False)
        then = time.perf_counter()

        def show(number: int) -> None:
            nonlocal then
            if time.perf_counter() - then >= (REFRESH if self.draws else SECONDS):
                then = time.perf_counter()
                if not self.draws:
                    self.say(f"{what}: {number:,}")
                    return
                with self.spared():
                    line.start()
                    line.update(f"{what}: {number:,}", refresh=True)

        try:
            yield show
        finally:
            with self.spared():
                line.stop()

    def start(self, share: float) -> None:
        """Begin to show steps.

        Args:
            share: How much of the run is done already, from 0 to 1.
        """
        self.began, self.first = time.perf_counter(), share
        if self.draws and not self.console.quiet:
            columns = (BarColumn(), TextColumn("{task.description}"))
            with self.spared():
                self.bar = Progress(*columns, console=self.console, auto_refresh=False)
                self.task, self.shown = self.bar.add_task("", total=1.0), -REFRESH
                self.bar.update(self.task, completed=share)
                self.bar.start()

    def step(
        self,
        place: str,
        share: float,
        loss: float,
        lr: float,
        tokens_per_s: float,
        mfu: Optional[float],
        memory: Optional[int],
    ) -> None:
        """Show one finished step: in the bar, or as a line where there is none.

        Args:
            place: Which step it is.
            share: How much of the run is done, from 0 to 1.
        """
        left = (time.perf_counter() - self.began) / max(share - self.first, 1e-9) * (1 - share)
        parts = (
            place,
            f"loss {loss:.4f}",
            f"lr {lr:.2e}",
            f"{tokens_per_s:,.0f} tokens/s",
            f"MFU {percent(mfu)}",
            f"peak {gigabytes(memory)}",
            f"{duration(left)} left",
        )
        if self.bar is None:
            self.say(" | ".join(parts))
            return
        with self.spared():
            now = time.perf_counter()
            due = now - self.shown >= REFRESH  # by no thread, whose errors nobody would catch
            self.shown = now if due else self.shown
            self.bar.update(self.task, completed=share, description="  ".join(parts), refresh=due)

    def stop(self) -> None:
        bar, self.bar = self.bar, None
        if bar is not None:
            with self.spared():
                bar.stop()
