"""The output folder of a run: whether it may be used, what is in it, where to go on, and its settings."""

import os
import shutil
from pathlib import Path
from typing import Any, Literal, Optional, Union

import yaml
from filelock import FileLock, Timeout

from litgpt.args import run_settings
from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.train.state import STATE, changes, checkpoints, damage, flat

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
    patterns = ("final", "step-[0-9]*", "metrics.csv", "logs", "loss.png", HYPERPARAMETERS)
    return [p for pattern in patterns for p in out_dir.glob(pattern)]


def take(out_dir: Path) -> FileLock:
    """Make the folder and keep other runs out of it while the lock lives; leftovers of a killed writer are removed.

    Raises:
        UserError: another run has it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        raise UserError(f"--out_dir {out_dir}: another run is writing there.") from e
    for pattern in (".final.*", ".best.*", ".step-*.*"):
        for path in out_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    return lock


def to_resume(out_dir: Path, resume: Union[bool, Literal["auto"], Path]) -> tuple[Optional[Path], list[str]]:
    """The checkpoint to go on with, None to start afresh, and what there is to say about it.

    Args:
        resume: True or auto for the newest whole checkpoint in `out_dir`; a path for that checkpoint, or for the newest
            one of that run.

    Raises:
        UserError: the path is not there, or holds no whole checkpoint.
    """
    if resume is False:
        return None, []
    folder = out_dir if resume in (True, "auto") else Path(str(resume))
    if resume not in (True, "auto") and not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such folder.")
    found = [folder] if (folder / STATE).is_file() else checkpoints(folder)
    words: list[str] = []
    for checkpoint in found:
        if (wrong := damage(checkpoint)) is None:
            return checkpoint, [*words, f"Going on with {checkpoint}."]
        words.append(f"{checkpoint} is damaged and is passed over: {wrong}.")
    if resume not in (True, "auto"):
        raise UserError(" ".join([*words, f"--resume {folder}: there is no whole checkpoint."]))
    return None, [*words, f"There is no whole checkpoint in {folder}: the run starts afresh."]


def is_finished(out_dir: Path, settings: dict[str, Any], has_checkpoint: bool) -> bool:
    """Whether `final/` is the result of a run with these settings.

    Raises:
        UserError: it is that of another run, which left no checkpoint to go on with.
    """
    if not (out_dir / "final" / HYPERPARAMETERS).is_file():
        return False
    then = yaml.safe_load((out_dir / "final" / HYPERPARAMETERS).read_text(encoding="utf-8"))
    changed = changes(flat(then if isinstance(then, dict) else {}), flat(settings))
    if changed and not has_checkpoint:
        raise UserError(
            f"--resume: the run in {out_dir} is finished and left no checkpoint, and {'; '.join(changed)}: name "
            "another --out_dir."
        )
    return not changed


def clear(out_dir: Path) -> None:
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
