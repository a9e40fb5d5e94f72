"""Mamba 2: layers whose memory of all earlier tokens is one matrix per head.

See `state_space` for the formula; a value is also added to its own output, times D. In the paper keys, queries, and
values are B, C, and X.

Shapes: B rows, T tokens, H heads, V size of a value.
"""

import math
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.attention import ForwardContext
from litgpt.model.config import Config
from litgpt.model.kernels import remat, rms_norm
from litgpt.model.linear import Linear
from litgpt.model.norm import RMSNorm
from litgpt.model.packing import Packing
from litgpt.model.recurrent import CausalConv, RecurrentLayer, reset_decay
from litgpt.model.state_space import one_token, state_space

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class GatedNorm(RMSNorm):
    """Of values that a gate has scaled, for each of several groups."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__(size, eps)
        self.groups = groups

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return remat(x, self.normalize, gate)

    def normalize(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(gate.dtype, torch.float32)
        grouped = (x.to(dtype) * F.silu(gate.to(dtype))).unflatten(-1, (self.groups, -1))
        ones = grouped.new_ones(grouped.size(-1))
        return (rms_norm(grouped, ones, self.eps).flatten(-2) * self.weight).to(gate.dtype)


class Mamba2(RecurrentLayer):
    """`in_proj` fuses the projections of the gate, values, keys, queries, and steps."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(layer)
        self.groups, self.key_size, heads = config.linear_key_heads, config.linear_key_size, config.linear_value_heads
        values, keys = heads * config.linear_value_size, self.groups * self.key_size
        self.sizes, self.mixed_sizes = (values, values + 2 * keys, heads), (values, keys, keys)
        self.state_shape = (self.groups, self.key_size, heads // self.groups, config.linear_value_size)
        self.in_proj = Linear(config.n_embd, sum(self.sizes), bias=config.recurrent_bias)
        self.conv = CausalConv(values + 2 * keys, config.conv_size, config.conv_bias)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(heads)) for _ in range(3))  # their usual names
        self.norm = GatedNorm(values, config.norm_eps, self.groups)
        self.out = Linear(values, config.n_embd, bias=config.recurrent_bias)
        self.limit = config.time_step_limit or [0.0, math.inf]

    def reset_parameters(self) -> None:
        reset_decay(self.A_log, self.dt_bias)
        nn.init.ones_(self.D)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        gate, mixed, step = self.in_proj(x).split_with_sizes(self.sizes, dim=-1)
        y = self.recurrent(context, mixed, remat(step, self.steps, self.dt_bias))
        return self.out(self.norm(y.flatten(2), gate))

    def steps(self, step: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """At least in float32."""
        dtype = torch.promote_types(step.dtype, torch.float32)
        return F.softplus(step.to(dtype) + bias.to(dtype)).clamp(*self.limit)

    def heads(self, mixed: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, Parts]:
        """Values, and the arguments of `state_space`."""
        v, k, q = F.silu(mixed).to(step.dtype).split_with_sizes(self.mixed_sizes, dim=-1)
        k, q = (t.unflatten(-1, (self.groups, self.key_size)) for t in (k, q))
        v = v.unflatten(-1, (step.size(-1), -1))
        return v, (q, k, v * step[..., None], -self.A_log.to(step.dtype).exp() * step)

    def scan(
        self, mixed: torch.Tensor, *others: torch.Tensor, packing: Optional[Packing] = None
    ) -> tuple[torch.Tensor, ...]:
        step, *states = others
        v, parts = self.heads(mixed, step)
        y, state = state_space(*parts, packing, *states)
        return y + v * self.D[:, None], state

    def one_token(self, mixed: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        step, states = others
        v, parts = self.heads(mixed, step)
        y, state = one_token(*parts, states)
        return y + v * self.D[:, None], state
