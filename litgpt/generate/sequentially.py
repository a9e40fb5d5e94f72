"""The layers of a model spread over several devices, one after the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.generate.inference_model import InferenceModel, natural_precision
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizeName
from litgpt.model import GPT
from litgpt.model.attention import ForwardContext
from litgpt.model.devices import Accelerator, PrecisionName, pick_device
from litgpt.model.kv_cache import EachRow


def usable_devices(accelerator: Accelerator, devices: Union[int, Literal["auto"]]) -> list[torch.device]:
    """So many devices of a kind, or all. A CPU is one, and so is Apple's GPU.

    Raises:
        UserError: there are not as many.
    """
    first = pick_device(accelerator)
    there = torch.cuda.device_count() if first.type == "cuda" else 1
    n = there if devices == "auto" else devices
    if not 1 <= n <= there:
        raise UserError(f"--devices {devices}: this machine has {there} of the kind {first.type}.")
    if first.type != "cuda":
        return [first]
    return [torch.device("cuda", i) for i in range(n)]


def open_spread(
    path: Path,
    base: Optional[Path],
    precision: Optional[PrecisionName],
    quantize: Optional[QuantizeName],
    accelerator: Accelerator,
    devices: Union[int, Literal["auto"]],
) -> InferenceModel:
    """What `Loaded.open` returns, with its layers spread over so many devices, or all.

    The weights pass through the memory of the CPU where there are several.

    Raises:
        UserError: as `Loaded.open` and `usable_devices`; or quantized layers are to be spread.
    """
    chosen = usable_devices(accelerator, devices)
    if len(chosen) == 1:
        return InferenceModel.open(path, base, precision, quantize, accelerator)
    if quantize is not None:
        raise UserError(f"--quantize {quantize} is for one device: quantized layers are not spread over {len(chosen)}.")
    natural: Any = natural_precision(ModelSource.open(path, base), chosen[0])
    loaded = InferenceModel.open(path, base, precision or natural, None, "cpu")
    spread(loaded.model, chosen)
    return loaded


def spread(model: GPT, devices: list[torch.device]) -> None:
    """Move each block of a model to a device, in runs of about the same length; the rest goes to the first.

    What passes from block to block follows. The cache of a layer lies where the layer is.
    """
    blocks, n, copies = model.transformer.h, len(devices), Copies()
    for i, block in enumerate(blocks):
        device = devices[i * n // len(blocks)]
        block.to(device)
        block.forward = on_device(block, device, copies, devices[0] if i == len(blocks) - 1 else None)
    rest_to(model, devices[0])


def rest_to(model: GPT, device: torch.device) -> None:
    """Move everything but the blocks."""
    for child in (*model.children(), *model.transformer.children()):
        if child is not model.transformer and child is not model.transformer.h:
            child.to(device)
    model.tie_weights()


class Copies:
    """What all layers of one forward share, on each of the devices."""

    def __init__(self) -> None:
        self.reading: Optional[ForwardContext] = None
        self.there: dict[torch.device, ForwardContext] = {}

    def on(self, reading: ForwardContext, device: torch.device) -> ForwardContext:
        if reading is not self.reading:
            self.reading, self.there = reading, {}
        if device not in self.there:
            self.there[device] = moved(reading, device)
        return self.there[device]


def moved(reading: ForwardContext, device: torch.device) -> ForwardContext:
    """A copy with its tensors on a device."""

    def to(t: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        return None if t is None else t.to(device)

    each = reading.each
    if each is not None:
        index = each.index if isinstance(each.index, slice) else each.index.to(device)
        each = EachRow(each.rows.to(device), each.positions.to(device), index, each.longest)
    ropes = [(cos.to(device), sin.to(device)) for cos, sin in reading.ropes]
    causal, window, padding = (to(mask) for mask in (reading.causal_mask, reading.window_mask, reading.padding_mask))
    return replace(reading, ropes=ropes, each=each, causal_mask=causal, window_mask=window, padding_mask=padding)


def on_device(
    block: nn.Module, device: torch.device, copies: Copies, back: Optional[torch.device]
) -> Callable[[torch.Tensor, ForwardContext], torch.Tensor]:
    forward = block.forward

    def wrapped(x: torch.Tensor, reading: ForwardContext) -> torch.Tensor:
        y = forward(x.to(device), copies.on(reading, device))
        return y if back is None else y.to(back)

    return wrapped
