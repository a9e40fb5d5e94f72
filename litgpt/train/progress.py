"""What a run shows on the screen."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

SECONDS = 5  # between two lines about something that takes long


def gigabytes(n_bytes: Optional[int]) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes is not None else "-"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Screen:
    """Rank 0's output: tables at the start and the end, and between them a progress bar, or plain lines where the
    output is no terminal.

    Args:
        active: Whether this process prints at all.
    """

    def __init__(self, active: bool) -> None:
        width = None if sys.stdout.isatty() else 200  # a file or a pipe has no edge to wrap at
        self.console = Console(quiet=not active, highlight=False, file=sys.stdout, width=width)
        self.bar: Optional[Progress] = None

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        self.console.print(table)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], None]]:
        """Show a number that grows while it is told: in place on a terminal, elsewhere as a line every few seconds."""
        status, then = self.console.status(what), time.perf_counter()

        def show(number: int) -> None:
            nonlocal then
            if self.console.is_terminal:
                status.start()
                status.update(f"{what}: {number:,}")
            elif time.perf_counter() - then >= SECONDS:
                self.say(f"{what}: {number:,}")
                then = time.perf_counter()

        try:
            yield show
        finally:
            status.stop()

    def start(self, total: int, done: int = 0) -> None:
        self.total, self.began, self.first = total, time.perf_counter(), done
        if self.console.is_terminal and not self.console.quiet:
            columns = (BarColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=self.console, transient=False)
            self.task = self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def step(self, done: int, loss: float, lr: float, tokens_per_s: float, mfu: float, memory: Optional[int]) -> None:
        """Show one finished step: in the bar, or as a line where there is none."""
        left = (time.perf_counter() - self.began) / (done - self.first) * (self.total - done)
        parts = (
            f"step {done}/{self.total}",
            f"loss {loss:.4f}",
            f"lr {lr:.2e}",
            f"{tokens_per_s:,.0f} tokens/s",
            f"MFU {mfu:.0%}",
            f"peak {gigabytes(memory)}",
            f"{duration(left)} left",
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description="  ".join(parts))
        else:
            self.say(" | ".join(parts))

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
