"""Resuming a run: which checkpoint to use, whether it belongs to this run, and whether the run is finished."""

import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch
from torch.optim import Optimizer

from litgpt.data.tokens import TokenizedRows
from litgpt.errors import UserError
from litgpt.storage.files import read_yaml
from litgpt.storage.outputs import SUMS, free_name, listed
from litgpt.text.prompt_style import now
from litgpt.train.args import TrainArgs
from litgpt.train.resume.command import again
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

LIMITS = ("train.epochs", "train.max_steps", "train.max_tokens", "train.max_time")  # of a run
STEPS = "the number of steps"  # setting: what the limits come to


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


def is_complete(run_folder: Path, checkpoint: Optional[Path]) -> bool:
    """Whether `final/` in the folder of a run is its result, and not that of a shorter run whose extension stopped."""
    final = run_folder / "final"
    if not listed(final / SUMS) and not (final / HYPERPARAMETERS).is_file():
        return False
    return checkpoint is None or (step := step_of(final)) == -1 or step >= step_of(checkpoint)


def is_finished(out_dir: Path, checkpoint: Optional[Path], now: dict[str, Any]) -> bool:
    """Whether `final/` is the result of a run with these settings, as `settings_of` returns them. Raises `UserError` if
    it is of another run that has no checkpoint to resume from."""
    if not is_complete(out_dir, checkpoint):
        return False
    then: dict[str, Any] = {}
    if (out_dir / "final" / HYPERPARAMETERS).is_file():
        with suppress(UserError):  # an invalid file is not from a run with these settings
            then = flat(read_yaml(out_dir / "final" / HYPERPARAMETERS))
    elif checkpoint is not None:  # a run from Python
        found = TrainingState.read(checkpoint, mmap=True).settings
        then = {name: found.get(name, value) for name, value in now.items()}
    else:
        return True
    changed = changes(then, now)
    if changed and checkpoint is None:
        raise UserError(
            f"--resume: The run in {out_dir} is finished and has no checkpoint, and its settings changed: "
            f"{'; '.join(changed)}. To train its result further, pass {out_dir / 'final'} as the model and another "
            "--out_dir. Runs that may be extended need checkpoints: --train.save_interval."
        )
    return not changed


def resume_hint(out_dir: Path) -> str:
    saved = next(iter(all_checkpoints(out_dir)), None)
    return f"{f'Saved {saved}.' if saved else 'No checkpoint was saved.'} To resume: {again(saved is not None)}"


def settings_of(train: TrainArgs, precision: str) -> dict[str, Any]:
    """The settings of a run, flat; of one from Python only its limits."""
    return flat(settings(precision)) or {name: getattr(train, name.removeprefix("train.")) for name in LIMITS}


def what_must_stay(run: "Run", optimizer: Optimizer) -> dict[str, Any]:
    kind, devices = type(optimizer), run.fabric.world_size
    return {
        **settings_of(run.train, run.precision_name),
        "the training rows (rows, tokens, checksum)": summary(run.dataset.train),
        "the validation rows (rows, tokens, checksum)": summary(run.dataset.val),
        STEPS: run.plan.steps,
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


def compare(state: TrainingState, now: dict[str, Any], run: "Run") -> list[str]:
    """Notes about settings that changed since a checkpoint. Raises `UserError` if they change the results and that is
    not allowed. A finished run may get new limits."""
    free = (*LIMITS, STEPS) if run.extends else ()
    changed = changes(without(state.settings, free), without(now, free))
    if changed and not run.resume_with_changes:
        raise UserError(
            f"--resume: {'; '.join(changed)}. These settings change the results. Restore them, or pass "
            "--resume_with_changes true."
        )
    notes = [f"Changed since the checkpoint: {'; '.join(changed)}."] if changed else []
    if state.settings.get(OPTIMIZER) != now[OPTIMIZER]:
        notes.append("The optimizer starts without state: the checkpoint has the state of another optimizer.")
    for name in ("threads", "torch"):
        if (then := state.settings.get(name)) != now[name]:
            notes.append(f"{name} was {then}, is now {now[name]}. The last digits of the results may differ.")
    return notes


def without(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def extend(run: "Run", state: TrainingState) -> list[str]:
    """Let a finished run go on to its new limits, from its last state, and tell how. Raises `UserError` if they are not
    beyond what it has done."""
    result, limits = run.result, {name: run.saver.settings.get(name) for name in LIMITS}
    changed = changes({name: state.settings.get(name) for name in LIMITS}, limits)
    if run.plan.is_done(result):
        given = ", ".join(f"--{name} {value}" for name, value in limits.items() if value is not None)
        raise UserError(
            f"--resume: The run in {run.out_dir} has finished {result.steps} steps, and {given} would end it there. "
            "Raise the limit to extend it."
        )
    if result.early:
        result.early, result.since_best = False, 0
    lr = run.plan.learning_rate(result, run.peak_lr, run.train.min_lr, run.train.lr_schedule)
    return changed and [
        f"Extending the finished run: {'; '.join(changed)}. Training continues after step {result.steps} of "
        f"{round(run.plan.total_steps(result))} with the learning rate of the longer schedule, {lr:.2e}."
    ]
