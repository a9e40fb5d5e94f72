"""Checks of a run's options, before anything is read or written."""

from typing import Optional, Union

from litgpt.errors import UserError
from litgpt.train.args import TrainArgs
from litgpt.train.base_model import BaseModel
from litgpt.train.method import Method


def check_machine(devices: Union[int, str], num_nodes: int, seed: int) -> None:
    if isinstance(devices, int) and devices < 1:
        raise UserError(f"--devices {devices} must be above 0, or auto.")
    if num_nodes < 1:
        raise UserError(f"--num_nodes {num_nodes} must be above 0.")
    if not 0 <= seed < 2**48:
        raise UserError(f"--seed {seed} must be at least 0 and below 2^48.")


def check_tied(base_model: BaseModel, train: TrainArgs) -> None:
    tied = base_model.config.tie_embeddings
    if train.tie_embeddings not in (None, tied):
        raise UserError(
            f"--train.tie_embeddings {train.tie_embeddings} does not match the checkpoint, which has {tied}."
        )


def check_quantize(quantize: Optional[str], method: Method, frozen: bool, precision: str) -> None:
    if quantize is not None and not frozen:
        raise UserError(f"--quantize {quantize} needs frozen weights, but {method.name} trains all of them.")
    if quantize is not None and not precision.endswith("-true"):
        raise UserError(
            f"--quantize {quantize} does not support --precision {precision}. Use bf16-true, 16-true, or 32-true."
        )


def unused_options(train: TrainArgs) -> list[str]:
    """A note about options that a constant learning rate does not use."""
    unused = [f"--train.{name}" for name in ("lr_decay_iters", "min_lr") if getattr(train, name)]
    if train.lr_schedule != "constant" or not unused:
        return []
    return [f"Ignored with --train.lr_schedule constant: {', '.join(unused)}."]


def unused_strategy(requested: str, used: str, world_size: int, cpu_offload: bool, offloads: bool) -> list[str]:
    """Notes about options of several devices that the run does not use."""
    notes = []
    if requested != "auto" and world_size == 1 and used != requested:
        notes.append(f"--strategy {requested} has no effect on one device.")
    if cpu_offload and not offloads:
        notes.append("--fsdp_cpu_offload true has no effect: it needs --strategy fsdp and GPUs.")
    return notes
