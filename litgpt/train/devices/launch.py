"""The devices of a run, their strategy and precision, as a Fabric."""

import ctypes
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch

from litgpt.errors import UserError
from litgpt.model.devices import DTYPES
from litgpt.model.gpt import GPT
from litgpt.train.devices.one_device import OneDevice

if TYPE_CHECKING:
    from lightning.fabric import Fabric

StrategyName = Literal["auto", "ddp", "fsdp"]
CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")
CONTEXT = 0.6 * 2**30  # bytes of CUDA's context, and of the code of kernels
FITS = 0.8  # share of a device's memory for weights and optimizer; the rest is for activations


def check_machine(devices: Union[int, str], num_nodes: int, seed: int) -> None:
    if isinstance(devices, int) and devices < 1:
        raise UserError(f"--devices {devices} must be above 0, or auto.")
    if num_nodes < 1:
        raise UserError(f"--num_nodes {num_nodes} must be above 0.")
    if not 0 <= seed < 2**48:
        raise UserError(f"--seed {seed} must be at least 0 and below 2^48.")


def layout(device: torch.device, devices: Union[int, Literal["auto"]], num_nodes: int) -> tuple[int, int]:
    """The devices per machine and the number of machines, from the options or from torchrun or SLURM. Raises
    `UserError` if the two disagree, or the machine has fewer devices."""
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type)
    started = started_by()
    if started is not None:
        who, local, nodes = started
        if devices not in (1, "auto", local):
            raise UserError(f"--devices {devices}, but {who} started {local} processes per machine. Omit --devices.")
        if num_nodes not in (1, nodes):
            raise UserError(f"--num_nodes {num_nodes}, but {who} runs on {nodes} machines. Omit --num_nodes.")
        devices, num_nodes = local, nodes
    elif devices == "auto":
        devices = there or 1
    if there is not None and devices > there:
        raise UserError(f"--devices {devices}, but this machine has {there} {device.type} device{'s' * (there != 1)}.")
    return devices, num_nodes


def started_by() -> Optional[tuple[str, int, int]]:
    """The launcher of this run's processes, if any: its name, processes per machine, and machines."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", local, int(os.environ["WORLD_SIZE"]) // local
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks > 1 and "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        if tasks % nodes:
            raise UserError(
                f"SLURM runs {tasks} tasks on {nodes} machines. Set --ntasks-per-node to use equal numbers."
            )
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))  # required by Lightning
        return "SLURM", tasks // nodes, nodes
    return None


def pick_strategy(
    requested: StrategyName, model: GPT, precision: str, quantize: Optional[str], memory: Optional[float]
) -> Literal["ddp", "fsdp"]:
    """Pick the strategy for a model on the meta device and for devices with this much memory, if known. The help of
    `--strategy` has the rule for `auto`. Raises `UserError` if fsdp does not support the quantization or the
    precision."""
    if quantize is not None and requested == "fsdp":
        raise UserError(f"--strategy fsdp does not support --quantize {quantize}. Use --strategy ddp.")
    if precision == "16-mixed" and requested == "fsdp":
        raise UserError("--strategy fsdp does not support --precision 16-mixed. Use bf16-mixed.")
    if requested != "auto":
        return requested
    if quantize is not None or precision == "16-mixed" or memory is None:
        return "ddp"
    # weights, and the gradients and two moments of those that are trained
    n = sum(p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())
    return "ddp" if DTYPES[precision].itemsize * n <= FITS * memory else "fsdp"


def unused_strategy(requested: str, used: str, world_size: int, cpu_offload: bool, offloads: bool) -> list[str]:
    """Notes about options of several devices that the run does not use."""
    notes = []
    if requested != "auto" and world_size == 1 and used != requested:
        notes.append(f"--strategy {requested} has no effect on one device.")
    if cpu_offload and not offloads:
        notes.append("--fsdp_cpu_offload true has no effect: it needs --strategy fsdp and GPUs.")
    return notes


def device_memory(device: torch.device, devices: int) -> Optional[int]:
    """The bytes of memory per device, on CPUs per process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    with suppress(OSError, ValueError):  # the limit of a container; "max" if there is none
        there = min(there, int(CONTAINER_MEMORY.read_text()))
    return there // devices


def usable_memory(device: torch.device, devices: int) -> Optional[float]:
    """What this process can have of `device_memory`: on a GPU, other processes keep theirs."""
    if device.type != "cuda":
        return device_memory(device, devices)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) + CONTEXT  # the context of this process exists already


def make_fabric(
    device: torch.device, devices: int, num_nodes: int, precision: str, strategy: str, offload: bool = False
) -> "Fabric":
    """A Fabric before its launch; a `OneDevice` where one process needs no more than that. `offload` keeps the shards
    in CPU memory."""
    if devices * num_nodes == 1 and not offload and precision.endswith("-true"):
        return OneDevice(device)  # type: ignore[return-value]
    return make_lightning(device, devices, num_nodes, precision, strategy, offload)


def make_lightning(
    device: torch.device, devices: int, num_nodes: int, precision: str, strategy: str, offload: bool
) -> "Fabric":
    """Lightning's Fabric; arguments as for `make_fabric`."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision, Precision
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy
    from lightning_utilities.core import rank_zero

    for logger in (rank_zero.log, logging.getLogger("lightning.fabric")):
        logger.setLevel(logging.WARNING)  # litgpt reports the devices itself

    plugins: list[Any] = [Precision()]  # converts nothing: trained weights may be more precise than the base
    if precision.endswith("-mixed"):
        plugins = [MixedPrecision(precision, device.type)]  # type: ignore[arg-type]
    if started_by() is None and "SLURM_NTASKS" in os.environ:  # a SLURM job with one task
        plugins.append(LightningEnvironment())
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = dict(accelerator=device.type, devices=devices, num_nodes=num_nodes, plugins=plugins)
    if strategy == "fsdp" and (devices * num_nodes > 1 or offload):
        from litgpt.train.devices.fsdp import ShardedFabric, ShardedStrategy

        backend = "cpu:gloo,cuda:nccl" if offload else backend
        return ShardedFabric(strategy=ShardedStrategy(devices * num_nodes, backend, offload), **options)
    ddp = DDPStrategy(process_group_backend=backend)
    return Fabric(strategy=ddp if devices * num_nodes > 1 else "auto", **options)


def give_memory_back() -> None:
    """Make glibc return freed blocks of 128 KiB and more to the system at once. It raises this threshold by default;
    fragmentation then makes a rank of a sharded CPU run use more memory than an unsharded run."""
    threshold = -3  # M_MMAP_THRESHOLD
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # not glibc
            ctypes.CDLL(None).mallopt(threshold, 2**17)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch: with rank 0 for the weights, which are the same on all ranks, and with the rank for dropout."""
    torch.manual_seed(seed + rank)
