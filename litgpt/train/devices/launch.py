"""Devices, how they share the work, and precision, as a Fabric or what does its work on one device."""

import ctypes
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.imports import importing
from litgpt.model import GPT
from litgpt.train.devices.one_device import OneDevice

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
StrategyName = Literal["auto", "ddp", "fsdp"]
WEIGHTS = 10**6  # of linear layers that keep a thread busy
THREADS, CHOSEN = torch.get_num_threads(), "OMP_NUM_THREADS" in os.environ  # before Lightning changes them
DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,  # the weights; the products are in bfloat16
    "16-mixed": torch.float32,
}
FITS = 0.8  # of a device's memory: the rest is for what a micro-batch takes


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


def layout(device: torch.device, devices: Union[int, Literal["auto"]], num_nodes: int) -> tuple[int, int]:
    """The devices of each machine, and the number of machines: as torchrun or SLURM has started the processes, or as
    they are asked for.

    Raises:
        UserError: the two contradict each other, or the machine has fewer devices.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type)
    started = started_by()
    if started is not None:
        who, local, nodes = started
        if devices not in (1, "auto", local):
            raise UserError(
                f"--devices {devices}, but {who} has started {local} on each machine: leave the option away."
            )
        if num_nodes not in (1, nodes):
            raise UserError(f"--num_nodes {num_nodes}, but {who} has started {nodes}: leave the option away.")
        devices, num_nodes = local, nodes
    elif devices == "auto":
        devices = there or 1
    if there is not None and devices > there:
        raise UserError(f"--devices {devices}: this machine has {there} of kind {device.type}.")
    return devices, num_nodes


def started_by() -> Optional[tuple[str, int, int]]:
    """Who has started several processes of this run, how many on each machine, and on how many machines."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", local, int(os.environ["WORLD_SIZE"]) // local
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks > 1 and "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        if tasks % nodes:
            raise UserError(
                f"SLURM runs {tasks} tasks on {nodes} machines: ask for as many on each (--ntasks-per-node)."
            )
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))  # without it Lightning refuses
        return "SLURM", tasks // nodes, nodes
    return None


def pick_strategy(
    wanted: StrategyName, model: GPT, precision: str, device: torch.device, devices: int, quantize: Optional[str]
) -> Literal["ddp", "fsdp"]:
    """How several devices share the work; the rule for `auto` is in the help of `--strategy`.

    Args:
        model: On the meta device, as it will be trained.
        devices: On this machine.

    Raises:
        UserError: quantized weights cannot be sharded, and sharded gradients cannot be scaled.
    """
    if quantize is not None and wanted == "fsdp":
        raise UserError(f"--strategy fsdp cannot shard what --quantize {quantize} packs: --strategy ddp does without.")
    if precision == "16-mixed" and wanted == "fsdp":
        raise UserError("--strategy fsdp does not scale gradients, as --precision 16-mixed wants: take bf16-mixed.")
    if wanted != "auto":
        return wanted
    memory = device_memory(device, devices)
    whole = quantize is not None or precision == "16-mixed" or memory is None
    return "ddp" if whole or needed(model, DTYPES[precision]) <= FITS * memory else "fsdp"  # type: ignore[operator]


def needed(model: GPT, dtype: torch.dtype) -> int:
    """The bytes of weights, gradients and AdamW's two moments."""
    return dtype.itemsize * sum(p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())


def device_memory(device: torch.device, devices: int) -> Optional[int]:
    """The bytes of one device, for CPUs of one process's share of the machine; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
    except (AttributeError, OSError, ValueError):
        return None


def make_fabric(
    device: torch.device, devices: int, num_nodes: int, precision: str, strategy: str, offload: bool = False
) -> "Fabric":
    """A Fabric that is not launched yet, or a `OneDevice`, which has what the loop uses of it.

    Args:
        strategy: `ddp` or `fsdp`; for a single device that does not offload there is none.
        offload: Keep sharded weights in the processor's memory.
    """
    if devices * num_nodes == 1 and not offload and precision.endswith("-true"):
        return OneDevice(device)  # type: ignore[return-value]
    with importing():
        return make_lightning(device, devices, num_nodes, precision, strategy, offload)


def make_lightning(
    device: torch.device, devices: int, num_nodes: int, precision: str, strategy: str, offload: bool = False
) -> "Fabric":
    """Arguments as those of `make_fabric`."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision, Precision
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy
    from lightning_utilities.core import rank_zero

    for logger in (rank_zero.log, logging.getLogger("lightning.fabric")):
        logger.setLevel(logging.WARNING)  # which ranks there are is said once, by us

    class TruePrecision(Precision):
        """Leaves every weight in the dtype that it was made with: trained ones may be finer than the frozen base."""

        def convert_input(self, data: Any) -> Any:
            return data

        def convert_output(self, data: Any) -> Any:
            return data

        def forward_context(self) -> AbstractContextManager:
            return nullcontext()

    plugins: list[Any] = [TruePrecision()]
    if precision.endswith("-mixed"):
        plugins = [MixedPrecision(precision, device.type)]  # type: ignore[arg-type]
    if started_by() is None and "SLURM_NTASKS" in os.environ:  # a job of one task is a machine like any other
        plugins.append(LightningEnvironment())
    backend = "nccl" if device.type == "cuda" else "gloo"
    chosen: Any = "auto"
    if strategy == "fsdp" and (devices * num_nodes > 1 or offload):
        from litgpt.train.devices.fsdp import ShardedStrategy

        chosen = ShardedStrategy(devices * num_nodes, "cpu:gloo,cuda:nccl" if offload else backend, offload)
    elif devices * num_nodes > 1:
        chosen = DDPStrategy(process_group_backend=backend)
    return Fabric(accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy=chosen, plugins=plugins)


def give_memory_back() -> None:
    """Have freed tensors go back to the system at once. On CPUs a sharded run makes and frees whole blocks all along.
    glibc, which would raise the size from which on it does not keep memory, kept them in pieces that fitted nothing: a
    rank needed more than a run on one device."""
    threshold = -3  # M_MMAP_THRESHOLD
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).mallopt(threshold, 2**17)


def share_threads(model: nn.Module, device: torch.device, devices: int = 1) -> None:
    """Where the devices of a machine are its processors, each takes its share of them; and a small model takes no more
    than it keeps busy, since threads that wait for each other crawl as soon as anything else runs on the machine.
    OMP_NUM_THREADS wins."""
    if device.type == "cpu" and not CHOSEN:
        weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
        torch.set_num_threads(max(1, min(THREADS // devices, weights // WEIGHTS)))


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed what the run draws from: the weights (on every rank alike), then dropout (on every rank its own)."""
    torch.manual_seed(seed + rank)


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
