"""The part of Lightning's Fabric that the training loop uses, for a run on one device. Importing Lightning would take a
third of the time to the first step."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class NoPrecision:
    """The precision plugin of a model that computes in the dtypes of its weights."""

    def forward_context(self) -> AbstractContextManager:
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state of another precision."""


class OneDevice:
    strategy = SimpleNamespace(precision=NoPrecision())
    world_size, global_rank, is_global_zero = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cpu" else torch.device(device.type, 0)

    def launch(self) -> None:
        pass

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
        pass
