"""The feed-forward part of a block."""

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.config import Config


class LLaMAMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202); `fc` holds the gate above the up projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        size, bias = config.intermediate_size, bool(config.mlp_bias)
        self.fc = nn.Linear(config.n_embd, 2 * size, bias=bias)
        self.fc.parts = (size, size)  # type: ignore[assignment]
        self.proj = nn.Linear(size, config.n_embd, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)
