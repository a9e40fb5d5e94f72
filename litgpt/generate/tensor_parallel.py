"""Tensor parallelism (https://arxiv.org/abs/1909.08053): each process has a part of each layer.

A process has some heads of every attention and a part of the width of every feed-forward layer. Their outputs, summed
over the processes, are those of the complete layers. Embedding, norms, routers and the head are complete everywhere.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.model.attention import CausalSelfAttention
from litgpt.model.config import Config
from litgpt.model.linear import Linear
from litgpt.model.mlp import LLaMAMoE
from litgpt.model.norm import EachHeadNorm

AllReduce = Callable[[torch.Tensor], None]  # sums over all processes, in place


def check_divisible(config: Config, world_size: int) -> None:
    """Raises:
    UserError: the layers of this model cannot be split into this many parts.
    """
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
    """Remove everything from a model that belongs to other processes.

    Args:
        model: Without adapters, and not quantized.
    """
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
