"""Fully sharded training (FSDP2): each device holds some rows of every pretrained weight, of its gradient and of its
optimizer state. The devices gather a block when they need it.

The weights that a method adds, such as LoRA's factors, are small and may have another dtype. They are replicated, and
their gradients averaged as in DDP.

torch's `fully_shard`: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn

from litgpt.families import weight_map
from litgpt.model.gpt import GPT
from litgpt.model.norm import EachHeadNorm, RMSNorm
from litgpt.train.loss import LossModel

NORMS = (nn.LayerNorm, RMSNorm, EachHeadNorm)  # computed in float32 in mixed precision


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over one group of all devices of all machines. `offload` keeps the shards in CPU
    memory."""

    def __init__(self, world_size: int, backend: str, offload: bool) -> None:
        super().__init__(
            parallelize_fn=lambda module, mesh: module,  # `shard` runs before the weights are read
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            process_group_backend=backend,
        )
        self.offload = offload
        self.replicated: list[nn.Parameter] = []
        self.accumulating = False  # whether more micro-batches of the step follow

    def shard(self, model: LossModel, matmuls: Optional[torch.dtype] = None) -> None:
        """Shard a model that is on the meta device. `matmuls` is the dtype of mixed precision."""
        shard(model, self.device_mesh["data_parallel"], matmuls, self.offload)

    def setup_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, LossModel)
        self.replicated = [p for p in added_parameters(module.gpt) if p.requires_grad]
        for p in self.replicated:
            torch.distributed.broadcast(p.detach(), 0)  # drawn from one seed, but hardware may differ
        return super().setup_module(module)

    def backward(self, tensor: torch.Tensor, module: Optional[nn.Module], *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, module, *args, **kwargs)
        if not self.accumulating and self.replicated:
            average(self.replicated)


class ShardedFabric(Fabric):
    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> Iterator[None]:  # type: ignore[override]
        """Defer averaging replicated gradients to the last micro-batch. Sharded gradients are reduced at once, because
        each device would have to hold all of them until then."""
        assert isinstance(self.strategy, ShardedStrategy)
        self.strategy.accumulating = enabled
        try:
            yield
        finally:
            self.strategy.accumulating = False


def shard(model: LossModel, mesh: Any, matmuls: Optional[torch.dtype] = None, offload: bool = False) -> None:
    """Shard a model that is on the meta device.

    In mixed precision, the matrices of a block are gathered in the dtype of the matmuls, `matmuls`. Autocast converts
    the same weights on one device, so that the results are equal. All other weights, which include the norms of the
    blocks, are gathered together in float32. Gradients are summed in float32.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    options = {"mesh": mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    lower = MixedPrecisionPolicy(matmuls, torch.float32 if matmuls else None, cast_forward_inputs=False)
    added, blocks = set(added_parameters(model.gpt)), model.gpt.transformer.h
    in_float32 = [m for m in blocks.modules() if isinstance(m, NORMS)] if matmuls else []
    fully_shard(model, ignored_params=added | set(blocks.parameters()) - parameters_of(in_float32), **options)
    for block in blocks:
        fully_shard(block, mp_policy=lower, ignored_params=added | parameters_of(in_float32), **options)
    if hasattr(model, "set_reduce_scatter_unused_params"):  # torch 2.13
        # what is not run on a rank has a gradient of 0 there
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
    if matmuls:
        read = model.read
        model.read = torch.autocast(mesh.device_type, matmuls)(read)  # type: ignore[method-assign]
    register_fsdp_forward_method(model, "read")


def parameters_of(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {p for module in modules for p in module.parameters()}


def added_parameters(gpt: GPT) -> list[nn.Parameter]:
    """The parameters that a method added to the pretrained weights."""
    pretrained = {id(p.value) for p in weight_map(gpt.config).parameters(gpt).values()}
    return [p for p in gpt.parameters() if id(p) not in pretrained]


def average(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all devices, with one all-reduce per dtype.

    A gradient that is missing on some devices counts as zero there, and they get the mean too, so that replicas stay
    equal. A gradient that is missing on all devices stays missing, as on a single device.
    """
    for dtype in sorted({p.dtype for p in parameters}, key=str):
        some = [p for p in parameters if p.dtype == dtype]
        missing = [i for i, p in enumerate(some) if p.grad is None]
        there = torch.ones(len(some), dtype=dtype, device=some[0].device)
        for i in missing:
            there[i] = 0
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
        flat = torch.cat([*(grad.flatten() for grad in grads), there])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        *means, there = flat.split([*(p.numel() for p in some), len(some)])
        for grad, mean in zip(grads, means):
            grad.copy_(mean.view_as(grad))
        for i in missing:
            if there[i]:  # synchronizes, but is rare
                some[i].grad = grads[i]
