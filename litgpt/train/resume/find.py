"""Resuming a run: which checkpoint to use, whether it belongs to this run, and the command that resumes it."""

import shlex
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch
from torch.optim import Optimizer

from litgpt.data.tokens import TokenizedRows
from litgpt.errors import UserError, without_secrets
from litgpt.storage.files import read_yaml
from litgpt.storage.outputs import SUMS, free_name, listed
from litgpt.text.chat_template import now
from litgpt.train.args import run_settings, run_words
from litgpt.train.resume.folder import HYPERPARAMETERS, settings
from litgpt.train.resume.state import (
    MICRO_BATCH,
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

if TYPE_CHECKING:
    from litgpt.train.run import Run

BOOLEANS = ("true", "false", "yes", "no", "null")


def to_resume(out_dir: Path, resume: Union[bool, Literal["auto"], Path]) -> tuple[Optional[Path], list[str]]:
    """The checkpoint to resume from, None to start from the beginning, and notes for the user.

    `resume` is True or auto for the newest complete checkpoint in `out_dir`, or the path of a checkpoint or a run.
    Raises `UserError` if that does not exist, has no complete checkpoint, or is not where this run can continue,
    because the run has newer checkpoints or `out_dir` contains another run.
    """
    if resume is False:
        return None, []
    automatic = resume in (True, "auto")
    folder = out_dir if automatic else Path(str(resume))
    if not automatic and not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such folder.")
    notes: list[str] = []
    for checkpoint in [folder] if (folder / STATE).is_file() else all_checkpoints(folder):
        if (wrong := damage(checkpoint)) is None:
            check_home(checkpoint, out_dir)
            return checkpoint, [*notes, f"Resuming from {checkpoint}."]
        notes.append(f"Skipping {checkpoint}, which is damaged: {wrong}.")
    if not automatic:
        raise UserError(" ".join([*notes, f"--resume {folder}: The folder has no complete checkpoint."]))
    return None, [*notes, f"Starting from the beginning: {folder} has no complete checkpoint."]


def all_checkpoints(out_dir: Path) -> list[Path]:
    """The step-* and best/ folders of a run, newest first."""
    best = [out_dir / "best"] if is_checkpoint(out_dir / "best") else []
    return sorted([*checkpoints(out_dir), *best], key=step_of, reverse=True)


def check_home(checkpoint: Path, out_dir: Path) -> None:
    """Raise `UserError` unless a run in `out_dir` may continue from `checkpoint`."""
    if checkpoint.resolve().parent != out_dir.resolve():
        if (out_dir / "final").exists() or all_checkpoints(out_dir):
            raise UserError(f"--resume {checkpoint}: --out_dir {out_dir} contains another run. Choose another folder.")
        return
    newer = [p for p in all_checkpoints(out_dir) if step_of(p) > step_of(checkpoint) and damage(p) is None]
    if newer:
        raise UserError(
            f"--resume {checkpoint}: The run has newer checkpoints ({', '.join(p.name for p in newer)}). Pass --resume "
            "true to use the newest, or use another --out_dir."
        )


def first_start(checkpoint: Optional[Path]) -> Optional[str]:
    """The time that the prompts of a run print, from its checkpoint; None without one."""
    return TrainingState.read(checkpoint, mmap=True).settings.get(TIME) if checkpoint is not None else None


def set_aside(out_dir: Path, checkpoint: Optional[Path]) -> None:
    """Rename the damaged checkpoints that were skipped, so that they are not taken for newer ones of this run."""
    for path in all_checkpoints(out_dir):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            path.rename(free_name(path.with_name(f"damaged-{path.name}")))


def is_finished(out_dir: Path, settings: dict[str, Any], has_checkpoint: bool) -> bool:
    """Whether `final/` is the result of a run with these settings. Raises `UserError` if it is of another run that has
    no checkpoint to resume from."""
    if not settings:  # a run from Python
        return bool(listed(out_dir / "final" / SUMS))
    if not (out_dir / "final" / HYPERPARAMETERS).is_file():
        return False
    then: dict[str, Any] = {}
    with suppress(UserError):  # an invalid file is not from a run with these settings
        then = read_yaml(out_dir / "final" / HYPERPARAMETERS)
    changed = changes(flat(then), flat(settings))
    if changed and not has_checkpoint:
        raise UserError(
            f"--resume: The run in {out_dir} is finished and has no checkpoint, and its settings changed: "
            f"{'; '.join(changed)}. Use another --out_dir."
        )
    return not changed


def resume_hint(out_dir: Path) -> str:
    saved = next(iter(all_checkpoints(out_dir)), None)
    return f"{f'Saved {saved}.' if saved else 'No checkpoint was saved.'} To resume: {again(saved is not None)}"


def again(saved: bool) -> str:
    """The command that resumes this run. If it has not saved a checkpoint, keep the --resume that it was started
    with."""
    words = list(run_words.get()) or ["litgpt", "..."]
    take_out(words, "--overwrite", lambda value: value.lower() in BOOLEANS)
    take_out(words, "--train.pause_after", lambda value: True)
    was = take_out(words, "--resume", lambda value: not value.startswith("-"))
    if (run_settings.get() or {}).get("overwrite"):
        words += ["--overwrite", "false"]
    before = ["", *words]  # a token follows its flag, or is part of a word
    words = ["***" if flag.endswith("access_token") else without_secrets(word) for flag, word in zip(before, words)]
    return shlex.join([*words, "--resume", was if was and not saved else "true"])


def take_out(words: list[str], flag: str, is_value: Callable[[str], bool]) -> Optional[str]:
    """Remove a flag and its value from the words of a command line. Returns the last value."""
    last = None
    for i in reversed([i for i, word in enumerate(words) if word == flag or word.startswith(f"{flag}=")]):
        follows = words[i] == flag and i + 1 < len(words) and is_value(words[i + 1])
        value = words[i + 1] if follows else words[i].partition("=")[2]
        last = last or value
        del words[i : i + 1 + follows]
    return last


def what_must_stay(run: "Run", optimizer: Optimizer) -> dict[str, Any]:
    kind, devices = type(optimizer), run.fabric.world_size
    return {
        **flat(settings(run.precision_name)),
        "the training rows (rows, tokens, checksum)": summary(run.dataset.train),
        "the validation rows (rows, tokens, checksum)": summary(run.dataset.val),
        "the number of steps": run.plan.steps,
        "the number of devices": devices,  # `--devices auto` may change
        **({"the strategy": run.sharing} if devices > 1 else {}),
        TIME: now().isoformat(),
        MICRO_BATCH: run.train.micro_batch_size,
        OPTIMIZER: f"{kind.__module__}.{kind.__qualname__}",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def summary(rows: TokenizedRows) -> list[int]:
    return [len(rows), int(rows.lengths.sum()), zlib.crc32(rows.row_hashes().numpy().tobytes())]


def compare(state: TrainingState, settings: dict[str, Any], allowed: bool) -> list[str]:
    """Notes about settings that changed since a checkpoint. Raises `UserError` if they change the results and that is
    not allowed."""
    changed = changes(state.settings, settings)
    if changed and not allowed:
        raise UserError(
            f"--resume: {'; '.join(changed)}. These settings change the results. Restore them, or pass "
            "--resume_with_changes true."
        )
    notes = [f"Changed since the checkpoint: {'; '.join(changed)}."] if changed else []
    if state.settings.get(OPTIMIZER) != settings[OPTIMIZER]:
        notes.append("The optimizer starts without state: the checkpoint has the state of another optimizer.")
    for name in ("threads", "torch"):
        if (then := state.settings.get(name)) != settings[name]:
            notes.append(f"{name} was {then}, is now {settings[name]}. The last digits of the results may differ.")
    return notes
