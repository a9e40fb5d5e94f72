"""Signals that end a run after the step it is in."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Optional

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # signal to exit code: 128 and its number, as shells have it
if hasattr(signal, "SIGUSR1"):  # what a queue sends before it takes the machine away
    CODES[signal.SIGUSR1] = 75  # EX_TEMPFAIL: to be tried again


class Stopped(SystemExit):
    """A run that was asked to end, with nothing left to save, ends with this exit code."""


class Signals:
    """While it is entered, the signals of `CODES` end the run: at once, or after the step where it holds them.

    A second SIGINT always stops at once.

    Args:
        speaks: Whether a signal is answered on stderr: on the first rank alone.

    Attributes:
        code: The exit code that was asked for, if any.
        holds: Whether a signal is noted instead of obeyed, because the run has something to save.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks, self.code, self.holds, self.interrupts = speaks, 0, False, 0
        self.before: dict[int, Any] = {}

    def note(self, number: int, frame: Optional[FrameType]) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
        self.code = self.code or CODES[signal.Signals(number)]
        if not self.holds:
            raise Stopped(self.code)
        if self.speaks:  # not by print, which may be what the signal has interrupted
            name = signal.Signals(number).name
            with suppress(OSError):  # stderr is closed
                os.write(2, f"\nlitgpt: {name}: saving after this step. Ctrl-C again stops at once.\n".encode())

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in CODES}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
