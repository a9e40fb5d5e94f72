"""Devices, precisions and threads."""

import os
import sys
from contextlib import suppress
from typing import Literal, Optional

import torch
from torch import nn

from litgpt.errors import UserError

PrecisionName = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"]
Accelerator = Literal["auto", "cpu", "cuda", "mps"]
WEIGHTS_PER_THREAD = 10**6  # in linear layers, that keep a thread busy
THREADS, CHOSEN = torch.get_num_threads(), "OMP_NUM_THREADS" in os.environ  # before Lightning changes them
DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,  # of the weights; matmuls are in bfloat16
    "16-mixed": torch.float32,
}


def pick_device(accelerator: Accelerator) -> torch.device:
    """The first device of this kind. Raises `UserError` if the machine has none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[accelerator]:
        raise UserError(f"--accelerator {accelerator} is not available on this machine, or torch was built without it.")
    return torch.device(accelerator)


def default_precision(device: torch.device, all_trained: bool = False) -> str:
    """`bf16-true` if the device supports bfloat16 natively, else `32-true`. If all weights are trained they stay in
    float32: `bf16-mixed` on a GPU, else `32-true`."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = device.type != "mps" and any(getattr(torch.cpu, name, bool)() for name in names)
    if all_trained:
        return "bf16-mixed" if native and device.type == "cuda" else "32-true"
    return "bf16-true" if native else "32-true"


def to_device(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies of integer tensors on the device, by one transfer that the host does not wait for. Tensors that are there
    already are returned."""
    new = [x for x in tensors if x.device != device]
    if not new:
        return list(tensors)
    buffer = pinned(torch.cat([x.flatten().long() for x in new])).to(device, non_blocking=True)
    parts = iter(buffer.split([x.numel() for x in new]))
    return [x if x.device == device else next(parts).view(x.shape).to(x.dtype) for x in tensors]


def pinned(x: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, from which a GPU copies without waiting; `x` itself without a GPU."""
    return x.pin_memory() if torch.cuda.is_available() else x


def share_threads(model: nn.Module, device: torch.device, devices: int = 1) -> None:
    """Divide the processors among the processes of a run without accelerator. OMP_NUM_THREADS overrides it. A small
    model gets only the threads that it keeps busy: idle ones slow down when anything else runs on the machine."""
    if device.type not in ("cuda", "mps") and not CHOSEN:
        weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
        torch.set_num_threads(max(1, min(THREADS // devices, weights // WEIGHTS_PER_THREAD)))


def peak_memory(device: torch.device) -> Optional[int]:
    """Peak memory so far, in bytes: of the device, or the process's resident set on a CPU. None if unknown."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            return torch.cuda.max_memory_allocated(device)
        return None
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
