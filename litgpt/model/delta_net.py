"""Gated delta nets: layers whose memory of all earlier tokens is one matrix per head.

See `delta_rule` for the formula.

Shapes: B rows, T tokens, D channels, H heads of values, K size of a key, V size of a value.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.attention import ForwardContext
from litgpt.model.config import Config
from litgpt.model.delta_rule import delta_rule, one_token
from litgpt.model.kernels import remat
from litgpt.model.linear import Linear
from litgpt.model.norm import RMSNorm


class CausalConv(nn.Module):
    """A convolution along the tokens of each channel, over a token and the ones before it in its sequence."""

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.weight.size(2) ** -0.5), self.weight.size(2) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`x` is (B, T, D), `positions` (T,) are those of the tokens in their sequences."""
        taps = self.weight[:, 0].unbind(1)
        y = x * taps[-1]
        for back in range(1, len(taps)):
            earlier = F.pad(x, (0, 0, back, 0))[:, : x.size(1)]
            y = torch.addcmul(y, earlier * (positions >= back)[:, None], taps[-1 - back])
        return y if self.bias is None else y + self.bias

    def continued(self, x: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs for new tokens (B, T, D) after a tail (B, size - 1, D) of earlier ones, and the new tail."""
        whole = torch.cat([tail.to(x.dtype), x], dim=1)
        after = torch.arange(whole.size(1), device=x.device)
        return self(whole, after)[:, tail.size(1) :], whole[:, -tail.size(1) :]


class GatedDeltaNet(nn.Module):
    """Takes the place of attention in a block. `in_qkv` fuses the projections of queries, keys, and values."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, heads = layer, config.linear_value_heads
        self.key_size, self.value_size = config.linear_key_size, config.linear_value_size
        keys, values = config.linear_key_heads * self.key_size, heads * self.value_size
        self.in_qkv = Linear(config.n_embd, 2 * keys + values, bias=False)
        self.in_qkv.parts = self.sizes = (keys, keys, values)  # type: ignore[assignment]
        self.in_gate = Linear(config.n_embd, values, bias=False)
        self.in_beta = Linear(config.n_embd, heads, bias=False)
        self.in_step = Linear(config.n_embd, heads, bias=False)
        self.conv = CausalConv(2 * keys + values, config.conv_size)
        self.A_log, self.dt_bias = (
            nn.Parameter(torch.empty(heads)),
            nn.Parameter(torch.empty(heads)),
        )  # their usual names
        self.norm = RMSNorm(self.value_size, config.norm_eps)
        self.out = Linear(values, config.n_embd, bias=False)

    def reset_parameters(self) -> None:
        """Rates from 1 to 16, and steps from 0.001 to 0.1, as for Mamba 2 (https://arxiv.org/abs/2405.21060)."""
        nn.init.uniform_(self.A_log, 0, math.log(16))
        nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1))

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        mixed, beta = self.in_qkv(x), remat(self.in_beta(x), torch.sigmoid)
        decay = remat(self.in_step(x), self.log_decay, self.A_log, self.dt_bias)
        if context.cache is None:
            mixed = remat(mixed, self.conv.forward, context.packing.positions)
            y, _ = delta_rule(*self.heads(mixed), decay, beta, context.packing)
        else:
            y = self.continued(mixed, decay, beta, context)
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

    def continued(
        self, mixed: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """(1, T, H, V), after the tokens in the cache, whose states are replaced."""
        cache, seqlens = context.cache, context.packing.seqlens
        assert cache is not None
        shapes = [(self.conv.weight.size(2) - 1, mixed.size(2)), (decay.size(2), self.key_size, self.value_size)]
        if max(seqlens) == 1:  # a token of each of several sequences
            tails, states = cache.states(self.layer, context.rows, shapes, mixed)
            mixed, tails = self.conv.continued(mixed.transpose(0, 1), tails)
            y, states = one_token(*self.heads(mixed), decay.transpose(0, 1), beta.transpose(0, 1), states)
            cache.put_states(self.layer, context.rows, (tails, states))
            return y.transpose(0, 1)
        outputs = []
        parts = zip(context.rows, *(t.split_with_sizes(seqlens, dim=1) for t in (mixed, decay, beta)))
        for row, part, rates, betas in parts:
            tails, states = cache.states(self.layer, [row], shapes, mixed)
            part, tails = self.conv.continued(part, tails)
            y, states = delta_rule(*self.heads(part), rates, betas, None, states)
            cache.put_states(self.layer, [row], (tails, states))
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def gated(y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (y.float() * F.silu(gate.float())).to(y.dtype)
