"""A model on several devices: its layers one after the other, or on each device a part of each layer.

With tensor parallelism (https://arxiv.org/abs/1909.08053), a process has some heads of every attention and a part of
the width of every feed-forward layer. Their outputs, summed over the processes, are those of the complete layers.
Embedding, norms, routers and the head are complete everywhere.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal, Optional, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.model.attention import CausalSelfAttention, ForwardContext
from litgpt.model.config import Config
from litgpt.model.devices import Accelerator, pick_device
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import EachRow
from litgpt.model.linear import Linear
from litgpt.model.mlp import LLaMAMoE
from litgpt.model.norm import EachHeadNorm
from litgpt.model.packing import Packing

DeviceCount = Union[int, Literal["auto"]]
AllReduce = Callable[[torch.Tensor], None]  # sums over all processes, in place


# one after the other


def usable_devices(accelerator: Accelerator, devices: DeviceCount) -> list[torch.device]:
    """This many devices of a type, or all. A CPU is one, and so is Apple's GPU. Raises `UserError` if there are not as
    many."""
    first = pick_device(accelerator)
    available = torch.cuda.device_count() if first.type == "cuda" else 1
    n = available if devices == "auto" else devices
    if not 1 <= n <= available:
        raise UserError(f"--devices {devices}: this machine has {available} of type {first.type}.")
    return [torch.device("cuda", i) for i in range(n)] if first.type == "cuda" else [first]


def spread(model: GPT, devices: list[torch.device]) -> None:
    """Move each block of a model to a device, in runs of about the same length; the rest goes to the first.

    The input of each block is moved to its device. The cache of a layer is where the layer is.
    """
    blocks, n, contexts = model.transformer.h, len(devices), DeviceContexts()
    for i, block in enumerate(blocks):
        device = devices[i * n // len(blocks)]
        block.to(device)
        block.forward = on_device(block, device, contexts, devices[0] if i == len(blocks) - 1 else None)
    for child in (*model.children(), *model.transformer.children()):
        if child is not model.transformer and child is not blocks:
            child.to(devices[0])
    model.tie_weights()


class DeviceContexts:
    """The context of the current forward pass, copied once to each device."""

    def __init__(self) -> None:
        self.context: Optional[ForwardContext] = None
        self.copies: dict[torch.device, ForwardContext] = {}

    def on(self, context: ForwardContext, device: torch.device) -> ForwardContext:
        if context is not self.context:
            self.context, self.copies = context, {}
        if device not in self.copies:
            self.copies[device] = to_device(context, device)
        return self.copies[device]


def to_device(value: Any, device: torch.device) -> Any:
    """A copy with its tensors on a device, also those within containers and the parts of a `ForwardContext`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {key: to_device(v, device) for key, v in value.items()}
    if isinstance(value, (ForwardContext, EachRow, Packing)):
        return replace(value, **{f.name: to_device(getattr(value, f.name), device) for f in fields(value)})
    return value


def on_device(
    block: nn.Module, device: torch.device, contexts: DeviceContexts, back: Optional[torch.device]
) -> Callable[[torch.Tensor, ForwardContext], torch.Tensor]:
    forward = block.forward

    def wrapped(x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        y = forward(x.to(device), contexts.on(context, device))
        return y if back is None else y.to(back)

    return wrapped


# tensor parallelism


def check_divisible(config: Config, world_size: int) -> None:
    """Raises `UserError` if the layers of this model cannot be split into this many parts."""
    widths = {"n_query_groups": config.n_query_groups, "intermediate_size": config.intermediate_size}
    if config.moe_intermediate_size:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
    wrong = [f"{name} {width}" for name, width in widths.items() if not width or width % world_size]
    if wrong:
        raise UserError(f"--devices {world_size} does not divide the model's {' and '.join(wrong)}.")
    if config.norm_qk and config.norm_qk_type == "olmo2" and world_size > 1:
        raise UserError(
            "Models that normalize their queries over all heads (OLMo 2 and 3) cannot be split by heads. Use litgpt "
            "generate_sequentially."
        )


class RowParallelLinear(nn.Module):
    """A part of a linear layer's input features. The outputs of all parts are summed; the bias is added once."""

    def __init__(self, linear: nn.Linear, bias: nn.Parameter | None, all_reduce: AllReduce) -> None:
        super().__init__()
        self.linear, self.bias, self.all_reduce = linear, bias, all_reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).contiguous()
        self.all_reduce(y)
        return y if self.bias is None else y + self.bias


def keep_part(model: GPT, rank: int, world_size: int, all_reduce: AllReduce) -> None:
    """Remove everything that belongs to other processes from a model without adapters that is not quantized."""
    check_divisible(model.config, world_size)
    for block in model.transformer.h:
        attention, mlp = block.attn, block.mlp
        assert isinstance(attention, CausalSelfAttention)
        split_attention(attention, rank, world_size, all_reduce)
        for part in mlp.experts if isinstance(mlp, LLaMAMoE) else [mlp]:
            sizes = getattr(part.fc, "parts", (part.fc.out_features,))  # type: ignore
            part.fc = split_outputs(part.fc, sizes, rank, world_size)  # type: ignore
            part.proj = split_inputs(part.proj, rank, world_size, all_reduce)  # type: ignore


def split_attention(attention: CausalSelfAttention, rank: int, world_size: int, all_reduce: AllReduce) -> None:
    config = attention.config
    attention.qkv = split_outputs(attention.qkv, config.qkv_sizes, rank, world_size)
    attention.proj = split_inputs(attention.proj, rank, world_size, all_reduce)  # type: ignore[assignment]
    if config.norm_qk:
        for norm in (attention.norm_q, attention.norm_k):
            if isinstance(norm, EachHeadNorm):
                own = norm.weight.view(len(norm.parts), -1).chunk(world_size)[rank].flatten().clone()
                norm.weight = nn.Parameter(own, requires_grad=False)
                norm.parts = norm.parts[: len(norm.parts) // world_size]
    heads = {"n_head": config.n_head // world_size, "n_query_groups": config.n_query_groups // world_size}
    attention.config = replace(config, **heads, head_size=config.head_size)  # type: ignore[arg-type]
    attention.n_groups = heads["n_query_groups"]


def split_outputs(linear: nn.Linear, sizes: tuple[int, ...], rank: int, world_size: int) -> Linear:
    """A rank's share of the output features, of each of the projections of these sizes that `linear` joins."""

    def own(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.chunk(world_size)[rank] for part in t.split(list(sizes))])

    return linear_from(own(linear.weight), own(linear.bias) if linear.bias is not None else None)


def split_inputs(linear: nn.Linear, rank: int, world_size: int, all_reduce: AllReduce) -> RowParallelLinear:
    """A rank's share of the input features."""
    own = linear.weight.chunk(world_size, dim=1)[rank].clone()
    return RowParallelLinear(linear_from(own, None), linear.bias, all_reduce)


def linear_from(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    with torch.device("meta"):
        linear = Linear(weight.size(1), weight.size(0), bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
