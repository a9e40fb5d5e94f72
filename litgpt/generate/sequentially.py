"""The layers of a model spread over several devices, one after the other."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Optional, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.model.attention import ForwardContext
from litgpt.model.devices import Accelerator, pick_device
from litgpt.model.kv_cache import EachRow

DeviceCount = Union[int, Literal["auto"]]


def usable_devices(accelerator: Accelerator, devices: DeviceCount) -> list[torch.device]:
    """This many devices of a type, or all. A CPU is one, and so is Apple's GPU. Raises `UserError` if there are not as
    many."""
    first = pick_device(accelerator)
    available = torch.cuda.device_count() if first.type == "cuda" else 1
    n = available if devices == "auto" else devices
    if not 1 <= n <= available:
        raise UserError(f"--devices {devices}: this machine has {available} of type {first.type}.")
    return [torch.device("cuda", i) for i in range(n)] if first.type == "cuda" else [first]


def spread(model: GPT, devices: list[torch.device]) -> None:
    """Move each block of a model to a device, in runs of about the same length; the rest goes to the first.

    The input of each block is moved to its device. The cache of a layer is where the layer is.
    """
    blocks, n, contexts = model.transformer.h, len(devices), DeviceContexts()
    for i, block in enumerate(blocks):
        device = devices[i * n // len(blocks)]
        block.to(device)
        block.forward = on_device(block, device, contexts, devices[0] if i == len(blocks) - 1 else None)
    for child in (*model.children(), *model.transformer.children()):
        if child is not model.transformer and child is not blocks:
            child.to(devices[0])
    model.tie_weights()


class DeviceContexts:
    """The context of the current forward pass, copied once to each device."""

    def __init__(self) -> None:
        self.context: Optional[ForwardContext] = None
        self.copies: dict[torch.device, ForwardContext] = {}

    def on(self, context: ForwardContext, device: torch.device) -> ForwardContext:
        if context is not self.context:
            self.context, self.copies = context, {}
        if device not in self.copies:
            self.copies[device] = to_device(context, device)
        return self.copies[device]


def to_device(value: Any, device: torch.device) -> Any:
    """A copy with its tensors on a device, also those within lists, tuples, and the parts of a `ForwardContext`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, (ForwardContext, EachRow)):
        return replace(value, **{name: to_device(v, device) for name, v in vars(value).items()})
    return value


def on_device(
    block: nn.Module, device: torch.device, contexts: DeviceContexts, back: Optional[torch.device]
) -> Callable[[torch.Tensor, ForwardContext], torch.Tensor]:
    forward = block.forward

    def wrapped(x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        y = forward(x.to(device), contexts.on(context, device))
        return y if back is None else y.to(back)

    return wrapped
