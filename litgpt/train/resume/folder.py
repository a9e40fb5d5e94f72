"""The output folder of a run: what may be written and removed there, and the settings file."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.storage.files import same, write_text
from litgpt.storage.outputs import SINGLE, check_place, discard, is_ours, listed, locked, refuse_others, split, tidy
from litgpt.train.args import run_settings
from litgpt.train.inbox import LOCK, inbox
from litgpt.train.metrics import FIELDS, LINE, METRICS
from litgpt.train.resume.command import afresh, again
from litgpt.train.resume.state import checkpoints, is_checkpoint

HYPERPARAMETERS, EXAMPLES, REPORT = "hyperparameters.yaml", "examples.jsonl", "report.html"
FOLDERS, FILES = ("final", "best"), (METRICS, "loss.png", HYPERPARAMETERS, EXAMPLES)  # besides checkpoints


def check_out_dir(out_dir: Path, overwrite: bool, resume: bool = False, sources: Iterable[Path] = ()) -> None:
    """Raise `UserError` if a run that reads `sources` must not write to `out_dir`, perhaps over an earlier run."""
    check_place(out_dir, sources)
    refuse_others(out_dir, in_the_way(out_dir, resume))
    paths = [*(out_dir / name for name in FOLDERS), *checkpoints(out_dir), *(out_dir / name for name in FILES)]
    if not (overwrite or resume) and any(path.exists() for path in paths):
        raise earlier_run(out_dir)


def earlier_run(out_dir: Path) -> UserError:
    """That a folder has a run, and what to type to go on with it, or to start over."""
    folders = [out_dir / "crash", *(out_dir / name for name in FOLDERS), *checkpoints(out_dir)]
    n_files = sum(len(split(folder)[0]) for folder in folders)
    n_files += sum((out_dir / name).exists() for name in (*FILES, SINGLE)) + is_ours(out_dir / REPORT)
    saved = next(iter(checkpoints(out_dir)), None)
    if (out_dir / "final").exists():
        state, remedy = "a finished run", "extend it (raise --train.epochs or --train.max_steps)"
    else:
        at = f"its last checkpoint is {saved.name}" if saved else "it has no checkpoint"
        state, remedy = f"an unfinished run ({at})", "go on"
    return UserError(
        f"--out_dir {out_dir} contains {state}.",
        [f"{remedy}: {again(saved=True)}", f"start over: {afresh()} (deletes {n_files} files)"],
    )


def in_the_way(out_dir: Path, resume: bool) -> list[Path]:
    """The files that the run would replace or remove but that are not ours. A run that resumes keeps damaged
    checkpoints, under another name."""
    others = []
    for path in [out_dir / name for name in FOLDERS] + ([] if resume else checkpoints(out_dir)):
        if path.is_dir() and not path.is_symlink():
            others += [] if resume and is_checkpoint(path) else split(path)[1]
        elif path.exists() or path.is_symlink():
            others.append(path)
    return others + [p for name in FILES if (p := out_dir / name).exists() and not is_of_run(p)]


def is_of_run(path: Path) -> bool:
    """Whether one of a run's `FILES` is ours. The metrics grow, so their header identifies them. Earlier releases did
    not record their files; a checkpoint with the same settings identifies them."""
    if path.name == METRICS and path in listed(path.with_name(SINGLE)):
        with open(path, encoding="utf-8", errors="replace") as f:
            return f"{f.readline(LINE).strip()},".startswith(",".join((*FIELDS, "")))
    if is_ours(path):
        return True
    own = path.with_name(HYPERPARAMETERS)
    copies = [folder / HYPERPARAMETERS for folder in checkpoints(path.parent)]
    return not path.with_name(SINGLE).exists() and any(c.is_file() and own.is_file() and same(c, own) for c in copies)


@contextmanager
def taken(out_dir: Path) -> Iterator[None]:
    """Create and lock the folder of a run, clean up after killed processes, and take commands there. Raises `UserError`
    if another run holds the lock."""
    with locked(out_dir / LOCK, f"--out_dir {out_dir}"):
        for path in [*out_dir.glob(".*.litgpt-new-*"), *out_dir.glob(".*.litgpt-old-*")]:
            tidy(out_dir / path.name[1:].partition(".litgpt-")[0])
        with inbox(out_dir):
            yield


def clear(out_dir: Path) -> None:
    """Remove an earlier run, but not the files of its logger."""
    for folder in [out_dir / "crash", *(out_dir / name for name in FOLDERS), *checkpoints(out_dir)]:
        discard(folder)
    if is_ours(out_dir / REPORT):  # of the earlier run
        (out_dir / REPORT).unlink()
    for name in (*FILES, SINGLE):
        (out_dir / name).unlink(missing_ok=True)


def settings(precision: str) -> dict[str, Any]:
    """The run's settings as parsed from the command line; empty for a run from Python."""
    parsed = run_settings.get()
    if not parsed:
        return {}
    kept = {k: v for k, v in parsed.items() if k not in ("overwrite", "resume", "resume_with_changes")}
    return kept | {"precision": precision}


def write_settings(folder: Path, precision: str, write: Callable[[Path, str], None] = write_text) -> None:
    """Write the run's settings to a file with which `--config` repeats the run."""
    if found := settings(precision):
        write(folder / HYPERPARAMETERS, yaml.safe_dump(found, sort_keys=False, allow_unicode=True))
