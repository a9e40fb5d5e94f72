"""Layers whose memory of all earlier tokens does not grow: the last inputs of a convolution, and a state.

Shapes: B rows, T tokens, D channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.attention import ForwardContext
from litgpt.model.config import Config
from litgpt.model.kernels import remat
from litgpt.model.kv_cache import Index, KVCache
from litgpt.model.linear import Linear
from litgpt.model.packing import Packing


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
        return self(whole, after)[:, tail.size(1) :], whole[:, x.size(1) :]


class RecurrentLayer(nn.Module):
    """Takes the place of attention in a block: a convolution, and what `scan` and `one_token` compute after it."""

    conv: CausalConv
    state_shape: tuple[int, ...] = ()  # of one sequence; without a state there is the convolution alone

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def reset_parameters(self) -> None:
        """For weights outside of other modules."""

    def scan(
        self, mixed: torch.Tensor, *others: torch.Tensor, packing: Optional[Packing] = None
    ) -> tuple[torch.Tensor, ...]:
        """Tokens after the convolution, (B, T, D), and `others`, of which the last is the state before them, if there
        is one. Returns their outputs and the new state. Each of the sequences of `packing` begins without a state."""
        return (mixed,)

    def one_token(self, mixed: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `scan`, for one token of each row."""
        return (mixed,)

    def recurrent(self, context: ForwardContext, mixed: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """The convolution of `mixed` (B, T, D), then the outputs of the recurrence, which reads the tensors `others` as
        well. After the tokens in the cache, if there is one: its states are replaced."""
        if context.cache is None:
            mixed = remat(mixed, self.conv.forward, context.packing.positions)
            return self.scan(mixed, *others, packing=context.packing)[0]
        cache, rows, seqlens, tensors = context.cache, context.rows, context.packing.seqlens, (mixed, *others)
        if max(seqlens) == 1:  # a token of each of several sequences
            tokens = (t.transpose(0, 1) for t in tensors)
            index = None if context.each is None else context.each.index
            return self.continued(cache, rows, index, self.one_token, *tokens).transpose(0, 1)
        parts = zip(*(t.split_with_sizes(seqlens, dim=1) for t in tensors))
        return torch.cat(
            [self.continued(cache, [row], None, self.scan, *part) for row, part in zip(rows, parts)], dim=1
        )

    def continued(
        self,
        cache: KVCache,
        rows: Sequence[int],
        index: Optional[Index],
        step: Callable[..., tuple[torch.Tensor, ...]],
        mixed: torch.Tensor,
        *others: torch.Tensor,
    ) -> torch.Tensor:
        shapes = [(self.conv.weight.size(2) - 1, mixed.size(2)), *([self.state_shape] if self.state_shape else [])]
        index = slice(rows[0], rows[0] + 1) if index is None else index
        tails, *states = cache.states(self.layer, rows, index, shapes, mixed)
        mixed, tails = self.conv.continued(mixed, tails)
        y, *states = step(mixed, *others, *states)
        cache.put_states(self.layer, index, (tails, *states))
        return y


class ShortConv(RecurrentLayer):
    """A convolution between two gates that depend on the token; LFM2's (https://arxiv.org/abs/2511.23404)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(layer)
        self.in_proj = Linear(config.n_embd, 3 * config.n_embd, bias=config.recurrent_bias)
        self.conv = CausalConv(config.n_embd, config.conv_size, config.conv_bias)
        self.out = Linear(config.n_embd, config.n_embd, bias=config.recurrent_bias)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        before, after, x = self.in_proj(x).chunk(3, dim=-1)
        return self.out(after * self.recurrent(context, before * x))


def reset_decay(log_rate: torch.Tensor, bias: torch.Tensor) -> None:
    """Rates from 1 to 16, and steps from 0.001 to 0.1, as for Mamba 2 (https://arxiv.org/abs/2405.21060)."""
    nn.init.uniform_(log_rate, 0, math.log(16))
    nn.init.uniform_(bias, math.log(0.001), math.log(0.1))
