"""Devices, precisions and threads."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
MATMULS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # dtypes of the matmuls, if not of the weights


def pick_device(accelerator: Accelerator) -> torch.device:
    """The first device of this kind. Raises `UserError` if the machine has none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[accelerator]:
        raise UserError(f"--accelerator {accelerator} is not available on this machine, or torch was built without it.")
    return torch.device(accelerator)


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type != "mps" and any(getattr(torch.cpu, name, bool)() for name in names)


def default_precision(device: torch.device) -> str:
    """The precision for inference: `bf16-true` if the device supports bfloat16 natively, else `16-true` on a CUDA GPU,
    else `32-true`."""
    if has_bf16(device):
        return "bf16-true"
    return "16-true" if device.type == "cuda" else "32-true"


def default_training_precision(device: torch.device, all_trained: bool = False) -> str:
    """The same for training. If all weights are trained they stay in float32: `bf16-mixed` on a GPU, else `32-true`. A
    CUDA GPU without bfloat16 needs `16-mixed`, since float16 gradients that are not scaled become 0."""
    if device.type == "cuda" and not has_bf16(device):
        return "16-mixed"
    if all_trained:
        return "bf16-mixed" if device.type == "cuda" else "32-true"
    return default_precision(device)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 matmuls may run in TF32 within this context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def uses_tf32(device: torch.device, precision: str) -> bool:
    """Whether training runs the float32 matmuls of a mixed precision in TF32. Those of `32-true` stay exact."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return has_tf32 and precision.endswith("-mixed")


def autocast_dtype(device: torch.device) -> Optional[torch.dtype]:
    """The dtype in which autocast computes matmuls on a device; None if it is off."""
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


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
