"""Normalization layers.

Shapes: B rows, T tokens.
"""

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.config import Config
from litgpt.model.kernels import remat, rms_norm


def make_norm(config: Config, size: int) -> nn.Module:
    """The config's norm over `size` dimensions."""
    if config.norm_class_name == "LayerNorm":
        kind = UnitOffsetLayerNorm if config.norm_unit_offset else LayerNorm
        return kind(size, config.norm_eps, elementwise_affine=config.norm_affine, bias=config.norm_bias)
    return (UnitOffsetRMSNorm if config.norm_unit_offset else RMSNorm)(size, config.norm_eps)


def make_qk_norm(config: Config, heads: int) -> nn.Module:
    """The norm of queries or keys: (B, T, heads, head size), or (B, T, heads * head size) for `norm_qk_type` olmo2."""
    if config.norm_qk_type == "each_head":
        return EachHeadNorm(heads, config.head_size, config.norm_eps)
    return make_norm(config, config.head_size * (heads if config.norm_qk_type == "olmo2" else 1))


class RMSNorm(nn.Module):
    """Divides by the root mean square, then scales (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return remat(x, rms_norm, self.weight, self.eps)


class UnitOffsetRMSNorm(RMSNorm):
    """Scales by 1 + weight, as Gemma does. In float32, since 1 + weight loses digits of the weight in 16 bits."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return remat(x, rms_norm, 1 + self.weight.float(), self.eps, True)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return remat(x, super().forward)


class UnitOffsetLayerNorm(LayerNorm):
    """Scales by 1 + weight, as Nemotron does; its LayerNorm1P (https://arxiv.org/abs/2402.16819)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return remat(x, self.normalize)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class EachHeadNorm(nn.Module):
    """A LayerNorm without bias for each head. Their weights are concatenated."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * size))
        self.parts = (size,) * heads
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, heads, size)
        return remat(x, self.normalize) * self.weight.view(x.shape[-2:])

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)
