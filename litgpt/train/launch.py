"""Devices and precision, as a Fabric."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch

from litgpt.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
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


def make_fabric(
    accelerator: Accelerator, devices: Union[int, Literal["auto"]], num_nodes: int, precision: str
) -> "Fabric":
    """A Fabric that is not launched yet."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision, Precision
    from lightning.fabric.strategies import DDPStrategy

    class TruePrecision(Precision):
        """Leaves every weight in the dtype that it was made with: trained ones may be finer than the frozen base."""

        def convert_input(self, data: Any) -> Any:
            return data

        def convert_output(self, data: Any) -> Any:
            return data

        def forward_context(self) -> AbstractContextManager:
            return nullcontext()

    device = pick_device(accelerator)
    plugin: Precision = TruePrecision()
    if precision.endswith("-mixed"):
        plugin = MixedPrecision(precision, device.type)  # type: ignore[arg-type]
    one = devices == 1 and num_nodes == 1
    strategy: Any = "auto" if one else DDPStrategy(process_group_backend="nccl" if device.type == "cuda" else "gloo")
    return Fabric(accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy=strategy, plugins=[plugin])


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed what the run draws from: the weights (on every rank alike), then dropout (on every rank its own)."""
    torch.manual_seed(seed + rank)


def peak_memory(device: torch.device) -> Optional[int]:
    """The most memory that was in use so far, in bytes: the device's, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
