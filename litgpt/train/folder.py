"""The output folder of a run: whether it may be used, what is in it, and the settings that are written there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from litgpt.args import run_settings
from litgpt.errors import UserError
from litgpt.files import put_back, write_text

HYPERPARAMETERS = "hyperparameters.yaml"


def check_out_dir(out_dir: Path, overwrite: bool) -> None:
    """Raise `UserError` if nothing may be written there."""
    above = next(p for p in (out_dir, *out_dir.parents) if p.exists())
    if not above.is_dir():
        raise UserError(f"--out_dir {out_dir}: {above} is a file; name a folder.")
    if not os.access(above, os.W_OK | os.X_OK) or (out_dir.is_symlink() and not out_dir.exists()):
        raise UserError(f"--out_dir {out_dir} cannot be written to.")
    if outputs(out_dir) and not overwrite:
        raise UserError(f"--out_dir {out_dir} holds an earlier run: name another, or give --overwrite true.")


def outputs(out_dir: Path) -> list[Path]:
    """What earlier runs left in `out_dir`."""
    patterns = ("final", "best", "step-[0-9]*", "metrics.csv", "logs", "loss.png", "crash", HYPERPARAMETERS)
    return [p for pattern in patterns for p in out_dir.glob(pattern)]


@contextmanager
def taken(out_dir: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it. What a killed writer left is removed, or put back where it was
    about to replace a folder.

    Raises:
        UserError: another run has it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        raise UserError(f"--out_dir {out_dir}: another run is writing there.") from e
    try:
        for pattern in (".final.*", ".best.*", ".step-*.*"):
            for path in out_dir.glob(pattern):
                put_back(path, out_dir / path.name.split(".")[1])
        yield
    finally:
        lock.release()


def clear(out_dir: Path) -> None:
    """Remove what an earlier run left."""
    for path in outputs(out_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def settings(precision: str) -> dict[str, Any]:
    """The run's settings as the command line parsed them; empty for a run from Python."""
    parsed = run_settings.get() or {}
    return (
        {k: v for k, v in parsed.items() if k not in ("overwrite", "resume", "resume_with_changes")}
        | {"precision": precision}
        if parsed
        else {}
    )


def write_settings(folder: Path, precision: str) -> None:
    """The run's settings as a file for `--config` that makes the same run again."""
    if found := settings(precision):
        write_text(folder / HYPERPARAMETERS, yaml.safe_dump(found, sort_keys=False, allow_unicode=True))
