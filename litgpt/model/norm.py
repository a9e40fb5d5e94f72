"""Normalization."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.config import Config

MANY = 2**14  # numbers from which on `CPURMSNorm` pays


def make_norm(config: Config, size: int) -> nn.Module:
    """The norm of this config over `size` dimensions."""
    if config.norm_class_name == "LayerNorm":
        return nn.LayerNorm(size, config.norm_eps, elementwise_affine=config.norm_affine)
    return (UnitOffsetRMSNorm if config.norm_unit_offset else RMSNorm)(size, config.norm_eps)


def make_qk_norm(config: Config, heads: int) -> nn.Module:
    """The norm of queries or keys, (B, T, heads, head size); with `norm_qk_type` olmo2 of (B, T, heads * head size)."""
    assert config.head_size is not None
    if config.norm_qk_type == "each_head":
        return EachHeadNorm(heads, config.head_size, config.norm_eps)
    return make_norm(config, config.head_size * (heads if config.norm_qk_type == "olmo2" else 1))


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cpu and x.numel() >= MANY and not torch.compiler.is_compiling():
            return CPURMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CPURMSNorm(torch.autograd.Function):
    """`F.rms_norm`, which on a CPU is a chain of small steps: in bfloat16 it takes seven times as long."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norms.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grads[0].float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).div_(x.size(-1)).unsqueeze(-1)
        return grad.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), grad_weight, None


class UnitOffsetRMSNorm(RMSNorm):
    """Scales by 1 + weight, in float32, as Gemma does: in 16 bits 1 + weight would lose the weight's last digits."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 1 + self.weight.float()
        if x.is_cpu and x.numel() >= MANY and not torch.compiler.is_compiling():
            return CPURMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, weight, self.eps).to(x.dtype)


class EachHeadNorm(nn.Module):
    """A LayerNorm without bias for each head; their weights lie one after the other."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * size))
        self.parts = (size,) * heads
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, heads, size)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.view(x.shape[-2:])
