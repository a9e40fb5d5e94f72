"""What is wrong with the options of a run, found before anything is read or written."""

from typing import Any, Optional, Union

from litgpt.errors import UserError
from litgpt.train.args import EvalArgs, LogArgs, TrainArgs
from litgpt.train.base_model import BaseModel
from litgpt.train.loggers import check_logger
from litgpt.train.method import Method


def check_options(
    train: TrainArgs,
    eval: EvalArgs,
    logger_name: str,
    log: LogArgs,
    devices: Union[int, str],
    num_nodes: int,
    seed: int,
    resume: Any,
    overwrite: bool,
) -> list[str]:
    """Raise `UserError` for options that cannot be run. Returns what there is to say about the others."""
    train.check()
    eval.check()
    notes = check_logger(logger_name, log)
    idle = [f"--train.{name}" for name in ("lr_decay_iters", "min_lr") if getattr(train, name)]
    if train.lr_schedule == "constant" and idle:
        notes.append(f"Without effect with --train.lr_schedule constant: {', '.join(idle)}.")
    check_machine(devices, num_nodes, seed)
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it: choose one.")
    return notes


def check_machine(devices: Union[int, str], num_nodes: int, seed: int) -> None:
    """Raise `UserError` for numbers that no machine and no generator takes."""
    if isinstance(devices, int) and devices < 1:
        raise UserError(f"--devices {devices} must be above 0, or auto.")
    if num_nodes < 1:
        raise UserError(f"--num_nodes {num_nodes} must be above 0.")
    if not 0 <= seed < 2**48:
        raise UserError(f"--seed {seed} must be at least 0 and below 2^48.")


def check_start(start: BaseModel, train: TrainArgs) -> None:
    """Raise `UserError` where the options ask for another model."""
    if train.tie_embeddings not in (None, start.config.tie_embeddings):
        raise UserError(
            f"--train.tie_embeddings {train.tie_embeddings}: the checkpoint has {start.config.tie_embeddings}."
        )


def check_quantize(quantize: Optional[str], method: Method, frozen: bool, precision: str) -> None:
    """Raise `UserError` for a method or a precision that quantized weights do not go with."""
    if quantize is not None and not frozen:
        raise UserError(f"--quantize {quantize} is for frozen weights, and {method.name} trains all of them.")
    if quantize is not None and not precision.endswith("-true"):
        raise UserError(f"--quantize {quantize} wants --precision bf16-true, 16-true or 32-true, not {precision}.")
