"""The output folder of a run: whether it may be used, what is in it, and the settings that are written there."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.storage.files import same, write_text
from litgpt.storage.outputs import SINGLE, check_place, discard, is_ours, listed, locked, refuse_others, split, tidy
from litgpt.train.args import run_settings
from litgpt.train.metrics import FIELDS, LINE, METRICS
from litgpt.train.resume.state import checkpoints, is_checkpoint

HYPERPARAMETERS = "hyperparameters.yaml"
FOLDERS, FILES = ("final", "best"), (METRICS, "loss.png", HYPERPARAMETERS)  # of a run, beside its checkpoints


def check_out_dir(out_dir: Path, overwrite: bool, resume: bool = False, sources: Iterable[Path] = ()) -> None:
    """Raise `UserError` if a run may not write there.

    Args:
        overwrite: Whether an earlier run may be removed.
        resume: Whether the run goes on with an earlier one.
        sources: Files and folders that the run reads.
    """
    check_place(out_dir, sources)
    refuse_others(out_dir, in_the_way(out_dir, resume))
    if not (overwrite or resume) and (found := earlier(out_dir)):
        more = "Go on with it: --resume true. Start over: --overwrite true."
        raise UserError(f"--out_dir {out_dir} holds an earlier run ({found[0].name}). {more}")


def earlier(out_dir: Path) -> list[Path]:
    """What earlier runs left in `out_dir`."""
    folders = [out_dir / name for name in FOLDERS]
    return [p for p in [*folders, *checkpoints(out_dir), *(out_dir / name for name in FILES)] if p.exists()]


def in_the_way(out_dir: Path, resume: bool) -> list[Path]:
    """The files where the run would write, or that it would remove, and that are not ours. A damaged checkpoint is no
    such thing: a run that goes on gives it another name."""
    others = []
    for path in [out_dir / name for name in FOLDERS] + ([] if resume else checkpoints(out_dir)):
        if path.is_dir() and not path.is_symlink():
            others += [] if resume and is_checkpoint(path) else split(path)[1]
        elif path.exists() or path.is_symlink():
            others.append(path)
    return others + [p for name in FILES if (p := out_dir / name).exists() and not is_of_run(p)]


def is_of_run(path: Path) -> bool:
    """Whether one of a run's `FILES` is ours. The metrics grow, so they are known by their header. Runs of earlier
    releases did not list their files: there a checkpoint with the same settings tells."""
    if path.name == METRICS and path in listed(path.with_name(SINGLE)):
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.readline(LINE).strip() == ",".join(FIELDS)
    if is_ours(path):
        return True
    own = path.with_name(HYPERPARAMETERS)
    copies = [folder / HYPERPARAMETERS for folder in checkpoints(path.parent)]
    return not path.with_name(SINGLE).exists() and any(c.is_file() and own.is_file() and same(c, own) for c in copies)


@contextmanager
def taken(out_dir: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it. What a killed writer left is removed, or put back where it was
    about to replace a folder.

    Raises:
        UserError: another run has it.
    """
    with locked(out_dir / ".lock", f"--out_dir {out_dir}"):
        for path in [*out_dir.glob(".*.litgpt-new-*"), *out_dir.glob(".*.litgpt-old-*")]:
            tidy(out_dir / path.name[1:].partition(".litgpt-")[0])
        yield


def clear(out_dir: Path) -> None:
    """Remove what an earlier run left. The files of its logger stay: they are the logger's."""
    for folder in [out_dir / "crash", *(out_dir / name for name in FOLDERS), *checkpoints(out_dir)]:
        discard(folder)
    for path in [out_dir / name for name in FILES]:
        if path.exists():
            path.unlink()
    (out_dir / SINGLE).unlink(missing_ok=True)


def settings(precision: str) -> dict[str, Any]:
    """The run's settings as the command line parsed them; empty for a run from Python."""
    parsed = run_settings.get() or {}
    return (
        {k: v for k, v in parsed.items() if k not in ("overwrite", "resume", "resume_with_changes")}
        | {"precision": precision}
        if parsed
        else {}
    )


def write_settings(folder: Path, precision: str, write: Callable[[Path, str], None] = write_text) -> None:
    """The run's settings as a file for `--config` that makes the same run again.

    Args:
        write: Writes a file, given its path and text.
    """
    if found := settings(precision):
        write(folder / HYPERPARAMETERS, yaml.safe_dump(found, sort_keys=False, allow_unicode=True))
