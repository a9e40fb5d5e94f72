"""A run on several devices in one process, for its memory on the first of them: torch's fake process group, which moves
nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import _sharding_prop as propagation
from torch.testing._internal.distributed.fake_pg import FakeStore

from litgpt.train.devices.fsdp import shard
from litgpt.train.devices.one_device import OneDevice
from litgpt.train.loss import LossModel
from litgpt.train.memory.meter import Meter

if TYPE_CHECKING:
    from litgpt.train.run import Run


@contextmanager
def on_ranks(run: "Run", n: int, meter: Meter) -> Iterator[None]:
    """Within it, a rehearsed run shards its model over a process group of `n` ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    mesh = init_device_mesh("cpu", (n,))

    def shard_model(model: LossModel, matmuls: Optional[torch.dtype] = None) -> None:
        shard(model, mesh, matmuls)

    # the layout of a result follows from tensors of full size, which are no part of the computation
    propagator: Any = propagation.ShardingPropagator
    original = propagator._propagate_tensor_meta_non_cached

    def unseen(*args: Any) -> Any:
        meter.paused = True
        try:
            return original(*args)
        finally:
            meter.paused = False

    propagator._propagate_tensor_meta_non_cached = unseen
    try:
        run.sharing, run.fabric.world_size = "fsdp", n  # type: ignore[misc]
        run.fabric.strategy = SimpleNamespace(precision=OneDevice.strategy.precision, shard=shard_model)  # type: ignore
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = original
        dist.destroy_process_group()
