"""Where a run goes on: the checkpoint, whether it is of this run, and the command that does it."""

import shlex
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch.optim import Optimizer

from litgpt.data.base import TokenizedDataset
from litgpt.data.tokens import TokenizedRows
from litgpt.errors import UserError, without_secrets
from litgpt.storage.files import read_yaml
from litgpt.storage.outputs import SUMS, free_name, listed
from litgpt.text.chat_template import now
from litgpt.train.args import run_settings, run_words
from litgpt.train.loop import Plan
from litgpt.train.resume.folder import HYPERPARAMETERS, settings
from litgpt.train.resume.state import (
    OPTIMIZER,
    STATE,
    TIME,
    TrainingState,
    changes,
    checkpoints,
    damage,
    flat,
    is_checkpoint,
    step_of,
)

TRUTH = ("true", "false", "yes", "no", "null")


def to_resume(out_dir: Path, resume: Union[bool, Literal["auto"], Path]) -> tuple[Optional[Path], list[str]]:
    """The checkpoint to go on with, None to start afresh, and what there is to say about it.

    Args:
        resume: True or auto for the newest whole checkpoint in `out_dir`; a path for that checkpoint, or for the newest
            one of that run.

    Raises:
        UserError: the path is not there, holds no whole checkpoint or is not where this run can go on: it has newer
            ones that would no longer belong to it, or `out_dir` holds another run.
    """
    if resume is False:
        return None, []
    folder = out_dir if resume in (True, "auto") else Path(str(resume))
    if resume not in (True, "auto") and not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such folder.")
    found = [folder] if (folder / STATE).is_file() else all_checkpoints(folder)
    words: list[str] = []
    for checkpoint in found:
        if (wrong := damage(checkpoint)) is None:
            check_home(checkpoint, out_dir)
            return checkpoint, [*words, f"Going on with {checkpoint}."]
        words.append(f"{checkpoint} is damaged and is passed over: {wrong}.")
    if resume not in (True, "auto"):
        raise UserError(" ".join([*words, f"--resume {folder}: there is no whole checkpoint."]))
    return None, [*words, f"There is no whole checkpoint in {folder}: the run starts afresh."]


def all_checkpoints(out_dir: Path) -> list[Path]:
    """The folders step-* and best/ of a run, the newest first."""
    best = [out_dir / "best"] if is_checkpoint(out_dir / "best") else []
    return sorted([*checkpoints(out_dir), *best], key=step_of, reverse=True)


def check_home(checkpoint: Path, out_dir: Path) -> None:
    """Raise `UserError` unless `out_dir` may go on with a checkpoint."""
    if checkpoint.resolve().parent != out_dir.resolve():
        if (out_dir / "final").exists() or all_checkpoints(out_dir):
            raise UserError(f"--resume {checkpoint}: --out_dir {out_dir} holds another run; name another.")
        return
    newer = [p for p in all_checkpoints(out_dir) if step_of(p) > step_of(checkpoint) and damage(p) is None]
    if newer:
        raise UserError(
            f"--resume {checkpoint}: the run has newer checkpoints ({', '.join(p.name for p in newer)}), which would "
            "no longer be of it. Go on with the newest (--resume true), or name another --out_dir."
        )


def first_start(checkpoint: Optional[Path]) -> Optional[str]:
    """The time that the prompts of a run show, from its checkpoint; None where there is none."""
    return TrainingState.read(checkpoint, mmap=True).settings.get(TIME) if checkpoint is not None else None


def set_aside(out_dir: Path, checkpoint: Optional[Path]) -> None:
    """Give the damaged checkpoints that were passed over names that no run uses: somebody may still want them, but they
    must not be taken for the newest of the run that goes on."""
    for path in all_checkpoints(out_dir):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            path.rename(free_name(path.with_name(f"damaged-{path.name}")))


def is_finished(out_dir: Path, settings: dict[str, Any], has_checkpoint: bool) -> bool:
    """Whether `final/` is the result of a run with these settings.

    Raises:
        UserError: it is that of another run, which left no checkpoint to go on with.
    """
    if not settings:  # a run from Python
        return bool(listed(out_dir / "final" / SUMS))
    if not (out_dir / "final" / HYPERPARAMETERS).is_file():
        return False
    then: dict[str, Any] = {}
    with suppress(UserError):  # whatever it is, it is not of a run with these settings
        then = read_yaml(out_dir / "final" / HYPERPARAMETERS)
    changed = changes(flat(then), flat(settings))
    if changed and not has_checkpoint:
        raise UserError(
            f"--resume: the run in {out_dir} is finished and left no checkpoint, and {'; '.join(changed)}: name "
            "another --out_dir."
        )
    return not changed


def resume_hint(out_dir: Path) -> str:
    """What a run says that was asked to end."""
    saved = next(iter(all_checkpoints(out_dir)), None)
    return f"{f'Saved {saved}.' if saved else 'Nothing is saved yet.'} Go on with: {again(saved is not None)}"


def again(saved: bool) -> str:
    """The command that goes on with this run.

    Args:
        saved: Whether it has a checkpoint; if not, where it began is still to be told.
    """
    words = list(run_words.get()) or ["litgpt", "..."]
    take_out(words, "--overwrite", lambda value: value.lower() in TRUTH)
    take_out(words, "--train.pause_after", lambda value: True)
    was = take_out(words, "--resume", lambda value: not value.startswith("-"))
    if (run_settings.get() or {}).get("overwrite"):
        words += ["--overwrite", "false"]
    after = ["", *words]  # a token is the word behind its flag, or within a word
    words = ["***" if flag.endswith("access_token") else without_secrets(word) for flag, word in zip(after, words)]
    return shlex.join([*words, "--resume", was if was and not saved else "true"])


def take_out(words: list[str], flag: str, is_value: Callable[[str], bool]) -> Optional[str]:
    """Remove a flag from the words of a command line, and the next word if that is its value. Returns the value."""
    last = None
    for i in reversed([i for i, word in enumerate(words) if word == flag or word.startswith(f"{flag}=")]):
        follows = words[i] == flag and i + 1 < len(words) and is_value(words[i + 1])
        value = words[i + 1] if follows else words[i].partition("=")[2]
        last = last or value
        del words[i : i + 1 + follows]
    return last


def what_must_stay(
    precision: str, loaded: TokenizedDataset, plan: Plan, optimizer: Optimizer, devices: int, shared: str
) -> dict[str, Any]:
    """Everything that has to be the same when the run goes on, and the threads and the torch, which is said."""
    kind = type(optimizer)
    return {
        **flat(settings(precision)),
        "the training rows (rows, tokens, checksum)": summary(loaded.train),
        "the validation rows (rows, tokens, checksum)": summary(loaded.val),
        "the number of steps": plan.steps,
        "the number of devices": devices,  # which --devices auto does not tell
        **({"the strategy": shared} if devices > 1 else {}),
        TIME: now().isoformat(),
        OPTIMIZER: f"{kind.__module__}.{kind.__qualname__}",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def summary(rows: TokenizedRows) -> list[int]:
    return [len(rows), int(rows.lengths.sum()), zlib.crc32(rows.row_hashes().numpy().tobytes())]


def compare(state: TrainingState, settings: dict[str, Any], allowed: bool) -> list[str]:
    """What to say about settings that changed since a checkpoint was written.

    Raises:
        UserError: they change the numbers of the run, and that is not allowed.
    """
    changed = changes(state.settings, settings)
    if changed and not allowed:
        raise UserError(
            f"--resume: {'; '.join(changed)}. The run would not be the one that was begun: change it back, or give "
            "--resume_with_changes true."
        )
    words = [f"Changed since the checkpoint: {'; '.join(changed)}."] if changed else []
    if state.settings.get(OPTIMIZER) != settings[OPTIMIZER]:
        words.append("The optimizer begins anew: the checkpoint has the state of another one.")
    for name in ("threads", "torch"):
        if (then := state.settings.get(name)) != settings[name]:
            words.append(f"{name}: {settings[name]}, before {then}; the last digits may differ.")
    return words
