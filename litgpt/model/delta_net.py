"""Gated delta nets: layers whose memory of all earlier tokens is one matrix per head.

See `delta_rule` for the formula.

Shapes: B rows, T tokens, D channels, H heads of values, K size of a key, V size of a value.
"""

from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.attention import ForwardContext
from litgpt.model.config import Config
from litgpt.model.delta_rule import delta_rule, one_token
from litgpt.model.kernels import remat
from litgpt.model.linear import Linear
from litgpt.model.norm import RMSNorm
from litgpt.model.packing import Packing
from litgpt.model.recurrent import CausalConv, RecurrentLayer, reset_decay


class GatedDeltaNet(RecurrentLayer):
    """`in_qkv` fuses the projections of queries, keys, and values."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(layer)
        heads = config.linear_value_heads
        self.key_size, self.value_size = config.linear_key_size, config.linear_value_size
        keys, values = config.linear_key_heads * self.key_size, heads * self.value_size
        self.in_qkv = Linear(config.n_embd, 2 * keys + values, bias=False)
        self.in_qkv.parts = self.sizes = (keys, keys, values)  # type: ignore[assignment]
        self.in_gate = Linear(config.n_embd, values, bias=False)
        self.in_beta = Linear(config.n_embd, heads, bias=False)
        self.in_step = Linear(config.n_embd, heads, bias=False)
        self.conv = CausalConv(2 * keys + values, config.conv_size)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(heads)) for _ in range(2))  # their usual names
        self.state_shape = (heads, self.key_size, self.value_size)
        self.norm = RMSNorm(self.value_size, config.norm_eps)
        self.out = Linear(values, config.n_embd, bias=False)

    def reset_parameters(self) -> None:
        reset_decay(self.A_log, self.dt_bias)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        mixed, beta = self.in_qkv(x), remat(self.in_beta(x), torch.sigmoid)
        decay = remat(self.in_step(x), self.log_decay, self.A_log, self.dt_bias)
        y = self.recurrent(context, mixed, decay, beta)
        return self.out(remat(self.norm(y.to(x.dtype)).flatten(2), gated, self.in_gate(x)))

    @staticmethod
    def log_decay(step: torch.Tensor, log_rate: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """At most 0, in float32."""
        return -log_rate.float().exp() * F.softplus(step.float() + bias.float())

    def heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys (B, T, K heads, K), and values (B, T, H, V)."""
        q, k, v = F.silu(mixed).split_with_sizes(self.sizes, dim=-1)
        q, k = (t.unflatten(-1, (-1, self.key_size)) for t in (q, k))
        return q, k, v.unflatten(-1, (-1, self.value_size))

    def scan(
        self, mixed: torch.Tensor, *others: torch.Tensor, packing: Optional[Packing] = None
    ) -> tuple[torch.Tensor, ...]:
        decay, beta, *states = others
        return delta_rule(*self.heads(mixed), decay, beta, packing, *states)

    def one_token(self, mixed: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return one_token(*self.heads(mixed), *others)


def gated(y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (y.float() * F.silu(gate.float())).to(y.dtype)
