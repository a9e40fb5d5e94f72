"""What the loop uses of Lightning's Fabric, for a run on one device: there it would do nothing, and its import takes a
third of the time to the first step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class AsItIs:
    """The precision of a model that computes in the dtypes of its weights: nothing is converted, and nothing scaled."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: what another precision has saved has no meaning here."""


class Alone:
    """The strategy where there is nobody to share with."""

    precision = AsItIs()


class OneDevice:
    """One process with one device.

    Args:
        device: Where the model is to be, and the batches.
    """

    strategy = Alone()
    world_size, global_rank, is_global_zero = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cpu" else torch.device(device.type, 0)

    def launch(self) -> None:
        """Nothing: this is the process."""

    def setup(self, model: nn.Module, optimizer: Optimizer, move_to_device: bool = True) -> tuple[nn.Module, Optimizer]:
        return (model.to(self.device) if move_to_device else model), optimizer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> AbstractContextManager:
        return nullcontext()

    def all_reduce(self, x: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return x

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        """Nothing: there is nobody to wait for."""
