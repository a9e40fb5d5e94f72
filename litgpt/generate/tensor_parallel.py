"""Tensor parallelism (https://arxiv.org/abs/1909.08053): every process has a part of each layer.

A process has some heads of every attention and a part of the width of every feed-forward layer. Their sums over the
processes are what the whole layers give. Embedding, norms, routers and the head are whole everywhere.
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

Sum = Callable[[torch.Tensor], None]  # in place, over all processes


def check_parts(config: Config, world: int) -> None:
    """Raises:
    UserError: the layers of this model cannot be cut into so many parts.
    """
    widths = {"n_query_groups": config.n_query_groups, "intermediate_size": config.intermediate_size}
    if config.moe_intermediate_size:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
    wrong = [f"{name} {width}" for name, width in widths.items() if not width or width % world]
    if wrong:
        raise UserError(f"--devices {world}: the model's {' and '.join(wrong)} cannot be cut into so many equal parts.")
    if config.norm_qk and config.norm_qk_type == "olmo2" and world > 1:
        raise UserError(
            "Models whose queries are normalized over all heads (OLMo 2 and 3) cannot be cut by heads: use "
            "litgpt generate_sequentially."
        )


class Summed(nn.Module):
    """A part of a linear layer's input features; the outputs of all parts are added, and the bias once."""

    def __init__(self, linear: nn.Linear, bias: nn.Parameter | None, add: Sum) -> None:
        super().__init__()
        self.linear, self.bias, self.add = linear, bias, add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).contiguous()
        self.add(y)
        return y if self.bias is None else y + self.bias


def keep_part(model: GPT, rank: int, world: int, add: Sum) -> None:
    """Cut everything from a model that belongs to other processes.

    Args:
        model: Its layers are plain ones, with no adapter and not quantized.
        add: Adds a tensor of all processes up, in place.
    """
    check_parts(model.config, world)
    for block in model.transformer.h:
        attention, mlp = block.attn, block.mlp
        assert isinstance(attention, CausalSelfAttention)
        cut_attention(attention, rank, world, add)
        for part in mlp.experts if isinstance(mlp, LLaMAMoE) else [mlp]:
            part.fc = rows(part.fc, getattr(part.fc, "parts", (part.fc.out_features,)), rank, world)  # type: ignore
            part.proj = columns(part.proj, rank, world, add)  # type: ignore


def cut_attention(attention: CausalSelfAttention, rank: int, world: int, add: Sum) -> None:
    config = attention.config
    assert config.n_query_groups is not None
    attention.qkv = rows(attention.qkv, config.qkv_sizes, rank, world)
    attention.proj = columns(attention.proj, rank, world, add)  # type: ignore[assignment]
    if config.norm_qk:
        for norm in (attention.norm_q, attention.norm_k):
            if isinstance(norm, EachHeadNorm):
                own = norm.weight.view(len(norm.parts), -1).chunk(world)[rank].flatten().clone()
                norm.weight = nn.Parameter(own, requires_grad=False)
                norm.parts = norm.parts[: len(norm.parts) // world]
    heads = {"n_head": config.n_head // world, "n_query_groups": config.n_query_groups // world}
    attention.config = replace(config, **heads, head_size=config.head_size)  # type: ignore[arg-type]
    attention.n_groups = heads["n_query_groups"]


def rows(linear: nn.Linear, parts: tuple[int, ...], rank: int, world: int) -> Linear:
    """A rank's share of the output features of each of the parts that lie one below the other."""

    def own(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.chunk(world)[rank] for part in t.split(list(parts))])

    return filled(own(linear.weight), own(linear.bias) if linear.bias is not None else None)


def columns(linear: nn.Linear, rank: int, world: int, add: Sum) -> Summed:
    """A rank's share of the input features."""
    return Summed(filled(linear.weight.chunk(world, dim=1)[rank].clone(), None), linear.bias, add)


def filled(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    with torch.device("meta"):
        linear = Linear(weight.size(1), weight.size(0), bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
