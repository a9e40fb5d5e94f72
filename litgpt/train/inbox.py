"""The inbox of a live run, a folder in which `litgpt ctl` leaves commands and the run leaves its answers."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from litgpt.errors import UserError, reason
from litgpt.storage.fields import Shape, misfit
from litgpt.storage.files import read_json, write_text
from litgpt.storage.outputs import is_locked

INBOX, COMMAND, ANSWER = ".ctl", ".json", ".answer"  # the folder, and the suffixes of the files in it
LOCK = ".lock"  # of a run's folder
# what a run can be told, with what its value is, if it has one, in the order in which they are followed after a step:
# a checkpoint knows all events of its step
ACTIONS = {"lr": "a learning rate", "sample": "a prompt", "eval": "", "save": "", "stop": ""}
SHAPE: Shape = {"action": frozenset(ACTIONS), "value": (str, None)}
POLL, GRACE = 0.05, 1.0  # seconds between looks at the inbox, and for which a run that ends waits for its readers


@dataclass(frozen=True)
class Command:
    """What to do after the current step. `name` is that of its file; None if the command repeats a recorded event."""

    action: str
    value: Optional[str] = None
    name: Optional[str] = None

    def check(self) -> None:
        """Raise `UserError` if the value is not one for this action."""
        kind = ACTIONS[self.action]
        if kind and not self.value:
            raise UserError(f"{self.action} needs {kind}: litgpt ctl RUN {self.action} VALUE")
        if not kind and self.value is not None:
            raise UserError(f"{self.action} takes no value, got {self.value!r}.")
        if self.action == "lr" and not 0 < self.rate < math.inf:
            raise UserError(f"lr {self.value}: the learning rate must be a finite number above 0.")

    @property
    def rate(self) -> float:
        with suppress(ValueError, TypeError):
            return float(self.value or "")
        return math.nan


@contextmanager
def inbox(out_dir: Path) -> Iterator[None]:
    """An empty inbox for a run that holds the lock of this folder. In the end, senders get a moment to read answers."""
    place = out_dir / INBOX
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
    place.mkdir(exist_ok=True)
    try:
        yield
    finally:
        until = time.monotonic() + GRACE
        while any(place.glob(f"*{ANSWER}")) and time.monotonic() < until:
            time.sleep(POLL)
        shutil.rmtree(place, ignore_errors=True)


# for the run


def waiting(place: Path) -> list[str]:
    """The names of the commands in an inbox, oldest first."""
    try:
        return sorted(entry.name for entry in os.scandir(place) if entry.name.endswith(COMMAND))
    except OSError:  # somebody removed the folder
        return []


def take(place: Path) -> list[Command]:
    """Take the commands out of an inbox, oldest first."""
    found = []
    for name in waiting(place):
        with suppress(OSError, UserError):  # not a command, or not from this version
            value = read_json(place / name)
            if misfit(value, SHAPE) is None:
                found.append(Command(value["action"], value["value"], name))
        with suppress(OSError):
            (place / name).unlink()
    return found


def answer(place: Path, command: Command, text: str, failed: bool = False) -> None:
    """Answer a command, unless nobody can read that."""
    if command.name is not None:
        with suppress(OSError):
            write_text((place / command.name).with_suffix(ANSWER), json.dumps({"text": text, "failed": failed}))


# for `litgpt ctl`


def is_live(out_dir: Path) -> bool:
    return is_locked(out_dir / LOCK) and (out_dir / INBOX).is_dir()


def send(out_dir: Path, command: Command) -> Path:
    """Put a command into the inbox of a run. Returns the file in which the answer will be."""
    file = out_dir / INBOX / f"{time.time_ns():020d}-{os.getpid()}{COMMAND}"
    try:
        write_text(file, json.dumps({"action": command.action, "value": command.value}))
    except OSError as e:
        raise UserError(f"The run in {out_dir} takes no commands now: {reason(e)}") from e
    return file.with_suffix(ANSWER)


def wait(out_dir: Path, file: Path, timeout: float) -> Optional[str]:
    """The answer to a command; None if there is none within `timeout` seconds. Raises `UserError` if the run could not
    follow the command, or ended before."""
    until = time.monotonic() + timeout
    while True:
        lives = is_live(out_dir)
        if file.is_file():
            found = read_json(file)
            file.unlink(missing_ok=True)
            if found["failed"]:
                raise UserError(found["text"])
            return found["text"]
        if not lives:
            raise UserError(f"The run in {out_dir} ended before it took the command.")
        if time.monotonic() >= until:
            return None
        time.sleep(POLL)
