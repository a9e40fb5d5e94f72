"""Signals that stop a run after the current step."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Optional

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # signal: exit code, 128 + its number as in shells
if hasattr(signal, "SIGUSR1"):  # schedulers send it before they reclaim a machine
    CODES[signal.SIGUSR1] = 75  # EX_TEMPFAIL: try again


class Stopped(SystemExit):
    """Ends a run that was asked to stop and has saved."""


class Signals:
    """A context in which the signals of `CODES` stop the run: at once, or after the current step if `holds` is set,
    because the run has something to save. A second SIGINT always stops at once.

    `code` is the requested exit code; 0 if there was no signal. Only the first rank `speaks`: it acknowledges signals
    on stderr.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks, self.code, self.holds, self.interrupts = speaks, 0, False, 0
        self.previous: dict[int, Any] = {}

    def handle(self, number: int, frame: Optional[FrameType]) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
        self.code = self.code or CODES[signal.Signals(number)]
        if not self.holds:
            raise Stopped(self.code)
        if self.speaks:  # the signal may have interrupted a print, so write directly
            name = signal.Signals(number).name
            with suppress(OSError):  # stderr is closed
                os.write(2, f"\nlitgpt: {name}: saving after this step. Press Ctrl-C again to stop at once.\n".encode())

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in CODES}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
