"""The device that a model runs on, its precision and its threads."""

import os
import sys
from contextlib import suppress
from typing import Literal, Optional

import torch
from torch import nn

from litgpt.errors import UserError

PrecisionName = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true"]
Accelerator = Literal["auto", "cpu", "cuda", "mps"]
WEIGHTS = 10**6  # of linear layers that keep a thread busy
THREADS, CHOSEN = torch.get_num_threads(), "OMP_NUM_THREADS" in os.environ  # before Lightning changes them
DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,  # the weights; the products are in bfloat16
    "16-mixed": torch.float32,
}


def pick_device(accelerator: Accelerator) -> torch.device:
    """The first device of this kind.

    Raises:
        UserError: the machine has none.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[accelerator]:
        raise UserError(f"--accelerator {accelerator}: this machine has none, or torch was built without it.")
    return torch.device(accelerator)


def default_precision(device: torch.device, all_trained: bool = False) -> str:
    """`bf16-true` where the device computes it natively, else `32-true`.

    Where all weights are trained they stay in float32: `bf16-mixed` on a GPU, else `32-true`.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        native = any(check() for check in checks if check is not None)
    else:
        native = False
    if all_trained:
        return "bf16-mixed" if native and device.type == "cuda" else "32-true"
    return "bf16-true" if native else "32-true"


def share_threads(model: nn.Module, device: torch.device, devices: int = 1) -> None:
    """Where the devices of a machine are its processors, each takes its share of them; and a small model takes no more
    than it keeps busy, since threads that wait for each other crawl as soon as anything else runs on the machine.
    OMP_NUM_THREADS wins."""
    if device.type == "cpu" and not CHOSEN:
        weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
        torch.set_num_threads(max(1, min(THREADS // devices, weights // WEIGHTS)))


def peak_memory(device: torch.device) -> Optional[int]:
    """The most memory that was in use so far, in bytes: the device's, or the process's resident set on a CPU. None if
    the system does not tell."""
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
