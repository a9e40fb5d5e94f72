"""Devices, how they share the work, and precision, as a Fabric or what does its work on one device."""

import ctypes
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch

from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.model.devices import DTYPES
from litgpt.train.devices.one_device import OneDevice

if TYPE_CHECKING:
    from lightning.fabric import Fabric

StrategyName = Literal["auto", "ddp", "fsdp"]
FITS = 0.8  # of a device's memory: the rest is for what a micro-batch takes


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


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed what the run draws from: the weights (on every rank alike), then dropout (on every rank its own)."""
    torch.manual_seed(seed + rank)
