"""The screen of a run: tables, messages, a live line in a terminal or a notebook, and lines of steps."""

import io
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Optional

from rich.console import Console
from rich.live import Live
from rich.text import Text

from litgpt.errors import reason, remark

COLUMNS = 80  # of lines in files and pipes
MIN_COLUMNS = 40  # for a live line; terminals of unknown size may claim to be narrower
MIN_BAR, MAX_BAR = 4, 40  # columns
REFRESH = 0.1  # seconds between updates of the live line
SECONDS = 5  # at least between lines, without a live line
SILENCE = 600  # seconds at most between printed steps without a live line
LIVE_SHARE, SHARE = 0.05, 0.01  # of the run between printed steps, with and without a live line


def gigabytes(n_bytes: Optional[int]) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes is not None else "-"


def percent(fraction: Optional[float], digits: int = 0) -> str:
    return f"{fraction:.{digits}%}" if fraction is not None else "-"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def unbroken(text: object) -> str:
    """A text at whose spaces a table does not begin a new line, such as a path."""
    return str(text).replace(" ", "\xa0")


class Output(Console):
    """A console that raises an error when its reader is gone, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("its reader has closed it")


class NotebookOutput(io.StringIO):
    """Shows what is written to it, and a live line below that, in one output of a notebook that updates itself."""

    live = ""
    handle: Any = None

    def flush(self) -> None:
        from IPython.display import display

        shown = {"text/plain": f"{self.getvalue()}{self.live}".rstrip("\n")}
        if self.handle is None:
            self.handle = display(shown, raw=True, display_id=True)
        else:
            self.handle.update(shown, raw=True)


def is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # closed
        return False


def fit(parts: Sequence[str], separator: str, width: int) -> str:
    """The first parts that fit into this many columns, but at least one."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + len(separator) + len(part) > width:
            break
        text += separator + part
    return text


@dataclass
class Step:
    """A finished step, as the screen shows it.

    Args:
        done: The fraction of the run that is done.
        position: The number of the step, such as `step 3/10`.
        loss: The training loss.
        val_loss: The last validation loss, if there is one.
        details: Makes more parts of a line, most important first. Called only if the step is shown.
    """

    done: float
    position: str
    loss: float
    val_loss: Optional[float] = None
    details: Callable[[], Sequence[str]] = tuple


class Screen:
    """The output of rank 0, if this is it (`active`). A terminal or a notebook has a live line at the bottom, which
    shows every step. Some steps are printed as lines.

    If the output fails, the run goes on: the screen says so once on stderr and shows nothing more.
    """

    def __init__(self, active: bool) -> None:
        self.notebook = NotebookOutput() if active and Console().is_jupyter else None
        self.console = Output(
            quiet=not active,
            file=self.notebook or sys.stdout or io.StringIO(),
            color_system=None if self.notebook else "auto",
            force_jupyter=False,
            highlight=False,
            emoji=False,
        )
        capable = self.console.is_interactive and is_terminal(self.console.file) and not os.environ.get("CI")
        self.interactive = capable and self.console.width >= MIN_COLUMNS
        if not self.interactive:
            self.console.width = COLUMNS
        self.live: Optional[Live] = None
        self.last: Optional[Step] = None  # the last step, unless a line shows it

    @property
    def is_live(self) -> bool:
        return (self.interactive or self.notebook is not None) and not self.console.quiet

    @contextmanager
    def tolerating_errors(self) -> Iterator[None]:
        """Silence the screen if the output fails: a closed pipe, a full disk, an odd terminal."""
        try:
            yield
        except Exception as e:
            if not self.console.quiet:
                self.console.quiet = True
                self.draw(Text())  # or the live line would swallow the remark
                remark(f"Output failed; the run continues without it: {reason(e)}")
                if isinstance(e, OSError):  # what is left in its buffer would fail when Python exits
                    with suppress(OSError, ValueError):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), self.console.file.fileno())

    def say(self, text: str = "") -> None:
        with self.tolerating_errors():
            self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Print the rows that are not empty. A word that is wider than the screen, such as a path, stays in one
        piece."""
        table = Text()
        if title:
            table.append(title + "\n", style="bold")
        names = [name for name, value in rows.items() if value]
        n = max(map(len, names), default=0)
        for name in names:
            for line in textwrap.wrap(
                rows[name], self.console.width - n - 3, break_long_words=False, break_on_hyphens=False
            ):
                table.append(f" {name:{n}}  ", style="cyan").append(line.replace("\xa0", " ") + "\n")
                name = ""
        with self.tolerating_errors():
            self.console.print(table, end="", soft_wrap=True)

    def draw(self, line: Text) -> None:
        """Show a line below all others, in place of the one that was there. An empty one removes it."""
        with self.tolerating_errors():
            if self.notebook is not None:
                if line or self.notebook.live:
                    self.notebook.live = line.plain
                    self.notebook.flush()
            elif not line and self.live is not None:
                live, self.live = self.live, None
                live.stop()
            elif line:
                if self.live is None:  # no refresh by rich's thread, whose errors nobody would catch
                    stderr = is_terminal(sys.stderr)
                    self.live = Live(console=self.console, transient=True, auto_refresh=False, redirect_stderr=stderr)
                    self.live.start()
                self.live.update(line, refresh=True)

    def bar(self, done: float, width: int) -> Text:
        n = int(done * width)
        full, empty = "#-" if self.console.options.ascii_only else "━─"
        return Text.assemble((full * n, "cyan"), (empty * (width - n), "dim"))

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, Optional[int]], None]]:
        """Yield a function that shows a growing count and the total, if that is known: in the live line, elsewhere in a
        line every few seconds."""
        began = last = time.perf_counter()

        def show(count: int, total: Optional[int] = None) -> None:
            nonlocal last
            if time.perf_counter() - last < (REFRESH if self.is_live else SECONDS):
                return
            last = time.perf_counter()
            text = f"{what}: {count:,}"
            if total:
                left = (last - began) * max(0, total - count) / max(count, 1)
                text += f" of {total:,}, {duration(left)} left"
            if not self.is_live:
                self.say(text)
            elif total:
                self.draw(self.bar(min(1.0, count / total), MAX_BAR // 2).append(f" {text}"))
            else:
                self.draw(Text(text))

        try:
            yield show
        finally:
            if self.is_live:
                self.draw(Text())

    def start(self, done: float, position: str) -> None:
        """Start to show steps, with this fraction of the run already done."""
        self.began, self.done_before = time.perf_counter(), done
        self.refreshed = self.printed = -math.inf  # when that was
        self.done_printed = done if self.is_live else -1.0  # else the first step is printed
        if self.is_live:
            self.draw(self.live_line(done, [position]))

    def step(self, step: Step) -> None:
        """Show a step in the live line. Print it if that is due."""
        now, self.last = time.perf_counter(), step
        seconds, share = now - self.printed, step.done - self.done_printed + 1e-9
        if share >= LIVE_SHARE if self.is_live else seconds >= SECONDS and (share >= SHARE or seconds >= SILENCE):
            self.printed, self.done_printed = now, step.done
            self.print_last()
        if self.is_live and now - self.refreshed >= REFRESH:
            self.refreshed = now
            losses = [f"loss {step.loss:.4f}"] + ([] if step.val_loss is None else [f"val {step.val_loss:.4f}"])
            self.draw(self.live_line(step.done, [step.position, self.left(step), *losses], step.details()))

    def left(self, step: Step) -> str:
        seconds = time.perf_counter() - self.began
        return f"{duration(seconds / max(step.done - self.done_before, 1e-9) * (1 - step.done))} left"

    def live_line(self, done: float, parts: Sequence[str], details: Sequence[str] = ()) -> Text:
        """The parts with a bar if there is room for it, and as many details as fit."""
        share, parts = f"{done:4.0%} ", [parts[0].removeprefix("step "), *parts[1:]]
        room = self.console.width - len(share)
        if len("  ".join(parts)) + 1 + MIN_BAR > room:
            return Text(share + fit(parts, "  ", room))
        text = fit([*parts, *details], "  ", room - 1 - MIN_BAR)
        return Text(share).append(self.bar(done, min(MAX_BAR, room - 1 - len(text)))).append(f" {text}")

    def print_last(self) -> None:
        """Print the last step, unless it has been printed."""
        step, self.last = self.last, None
        if step is not None:
            parts = [step.position, f"loss {step.loss:.4f}", self.left(step), *step.details()]
            self.say(fit(parts, " | ", self.console.width))

    def stop(self) -> None:
        """Remove the live line, and print the last step."""
        if self.is_live:
            self.draw(Text())
        self.print_last()
