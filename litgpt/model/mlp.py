"""The MLP of a block.

Shapes: B rows, T tokens, C = n_embd, N = B T tokens.
"""

from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.config import Config
from litgpt.model.kernels import remat
from litgpt.model.linear import Linear, linear


class LLaMAMLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202). `fc` fuses the gate and up projections, in this order."""

    def __init__(self, config: Config, intermediate_size: Optional[int] = None) -> None:
        super().__init__()
        size, bias = intermediate_size or config.intermediate_size, bool(config.mlp_bias)
        self.fc = Linear(config.n_embd, 2 * size, bias=bias)
        self.fc.parts = (size, size)  # type: ignore[assignment]
        self.proj = Linear(size, config.n_embd, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(remat(self.fc(x), self.glu))

    def glu(self, x: torch.Tensor) -> torch.Tensor:
        """The gated half of `x`, (..., 2 size) to (..., size)."""
        gate, up = x.chunk(2, dim=-1)
        return remat(gate, self.activation) * up

    def activation(self, gate: torch.Tensor) -> torch.Tensor:
        return F.silu(gate)


class GemmaMLP(LLaMAMLP):
    """GeGLU: the same with GELU instead of SiLU."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.approximate = config.gelu_approximate

    def activation(self, gate: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate=self.approximate)


class GptNeoxMLP(nn.Module):
    """Up, GELU, down, without a gate."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = Linear(config.n_embd, config.intermediate_size, bias=bool(config.mlp_bias))
        self.proj = Linear(config.intermediate_size, config.n_embd, bias=bool(config.mlp_bias))
        self.approximate = config.gelu_approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(remat(self.fc(x), self.activation))

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate=self.approximate)


class Router(nn.Module):
    """The scores of the experts for each token, (N, n_expert). Not an `nn.Linear`, so that no method adapts or
    quantizes it; `transformers` and `peft` do the same."""

    def __init__(self, n_embd: int, n_expert: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n_embd, n_expert
        self.weight = nn.Parameter(torch.empty(n_expert, n_embd))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=n_embd**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(tokens, self.weight)


class LLaMAMoE(nn.Module):
    """A mixture of experts: each token goes through the experts with the highest scores.

    https://arxiv.org/abs/2401.04088. Tokens are sorted by expert, so that each expert runs once, on all of its tokens.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.moe_intermediate_size or config.intermediate_size
        self.gate = Router(config.n_embd, config.n_expert)
        self.experts = nn.ModuleList(LLaMAMLP(config, size) for _ in range(config.n_expert))
        self.n_chosen = config.n_expert_per_token
        self.normalize = config.norm_topk_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)  # (N, C)
        shares, chosen = self.gate(tokens).softmax(-1, dtype=torch.float32).topk(self.n_chosen)  # (N, n_chosen)
        if self.normalize:
            shares = shares / shares.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # (N * n_chosen,), sorted by expert
        owners = order // self.n_chosen  # the token of each choice
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        grouped = tokens[owners].split(counts)
        # in training every expert runs, so that all devices have gradients of the same weights
        parts = [expert(part) for expert, part in zip(self.experts, grouped) if len(part) or self.training]
        y = torch.cat(parts) * shares.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, owners, y.to(x.dtype)).view_as(x)


MLPS = {mlp.__name__: mlp for mlp in (LLaMAMLP, GemmaMLP, GptNeoxMLP, LLaMAMoE)}
