"""Normalization."""

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
