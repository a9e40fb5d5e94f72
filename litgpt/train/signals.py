"""Signals that end a run after the step it is in."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Optional

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # signal to exit code: 128 and its number, as shells have it
if hasattr(signal, "SIGUSR1"):  # what a queue sends before it takes the machine away
    CODES[signal.SIGUSR1] = 75  # EX_TEMPFAIL: to be tried again


class Stopped(SystemExit):
    """A run that was asked to end has saved, and ends with this exit code."""


class Signals:
    """While it is entered, the first of `CODES` is noted instead of obeyed. A second SIGINT stops at once.

    Attributes:
        code: The exit code that was asked for, if any.
    """

    def __init__(self, active: bool) -> None:
        self.active, self.code = active, 0
        self.before: dict[int, Any] = {}

    def note(self, number: int, frame: Optional[FrameType]) -> None:
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = CODES[signal.Signals(number)]
        if self.active:
            name = signal.Signals(number).name
            print(f"\nlitgpt: {name}: saving after this step. Ctrl-C again stops at once.", file=sys.stderr, flush=True)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in CODES}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
