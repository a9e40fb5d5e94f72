"""Fully sharded training (FSDP2): of every pretrained weight each device keeps some rows, and so of its gradient and of
what the optimizer knows about it. A block is put together on all devices when it is needed, and taken apart after that.

What a method added, such as LoRA's factors, is small and of another dtype: every device has it whole, and its gradients
are averaged as in DDP. Of the sharded weights the frozen ones have no gradient, and none is sent around.

torch's `fully_shard`: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Optional

import torch
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn

from litgpt.families import weight_map
from litgpt.model import GPT
from litgpt.train.loss import LossModel


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's, over one group of all devices, for a model that `shard` has sharded.

    Args:
        world_size: The number of devices on all machines.
        backend: How they talk to each other.
        offload: Whether each device's rows stay in the memory of its processor.
    """

    def __init__(self, world_size: int, backend: str, offload: bool) -> None:
        super().__init__(
            parallelize_fn=lambda module, mesh: module,  # `shard` comes before the weights are read
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            process_group_backend=backend,
        )
        self.offload = offload
        self.replicated: list[nn.Parameter] = []
        self.waits = False  # whether more micro-batches of the step follow
        self._backward_sync_control = WaitingControl(self)

    def shard(self, model: LossModel) -> None:
        """Shard a model on the meta device, where it takes no memory."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        gpt = model.gpt
        added = added_parameters(gpt)
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy(),
            "ignored_params": set(added),
        }
        for block in gpt.transformer.h:
            fully_shard(block, **options)
        fully_shard(model, **options)
        register_fsdp_forward_method(model, "read")

    def setup_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, LossModel)
        self.replicated = [p for p in added_parameters(module.gpt) if p.requires_grad]
        for p in self.replicated:
            torch.distributed.broadcast(p.detach(), 0)  # they were drawn alike, up to what the hardware does
        return super().setup_module(module)

    def backward(self, tensor: torch.Tensor, module: Optional[nn.Module], *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, module, *args, **kwargs)
        if not self.waits and self.replicated:
            average(self.replicated)


class WaitingControl(_BackwardSyncControl):
    """Gradients that every device has whole wait for the last micro-batch of a step. Those of sharded weights do not:
    each device would hold all of them until then."""

    def __init__(self, strategy: ShardedStrategy) -> None:
        self.strategy = strategy

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager:
        return self.waiting(enabled)

    @contextmanager
    def waiting(self, enabled: bool) -> Iterator[None]:
        self.strategy.waits = enabled
        try:
            yield
        finally:
            self.strategy.waits = False


def added_parameters(gpt: GPT) -> list[nn.Parameter]:
    """What a method added to the pretrained weights."""
    pretrained = {id(p.value) for p in weight_map(gpt.config).parameters(gpt).values()}
    return [p for p in gpt.parameters() if id(p) not in pretrained]


def average(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all devices, at once for each dtype.

    One that a device does not have counts as zero, and the device gets the mean as well, or its parameter would no
    longer be that of the others. One that no device has stays away, as on a single device.
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
            if there[i]:  # a GPU is waited for, but only here
                some[i].grad = grads[i]
