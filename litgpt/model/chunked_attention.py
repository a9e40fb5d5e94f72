"""Attention written out as matmuls, for scores that no fused kernel computes, and for CPUs.

Shapes: B rows, T tokens, S tokens that they may attend to, n query heads, g key-value heads, hs head size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from litgpt.model.devices import autocast_dtype

ROUND = 32  # the smallest step of `rounded`
QUERIES = 64  # the smallest chunk
PLAIN_SCORES = 2**26  # of all heads that `plain_attention` computes at once


def rounded(n: int) -> int:
    """`n` tokens rounded up to a multiple of `ROUND`, or of a sixteenth of the next power of two. oneDNN compiles a
    kernel for each number that it meets and keeps half a megabyte for it: few numbers, few kernels."""
    step = max(ROUND, 2 ** ((n - 1).bit_length() - 4)) if n else ROUND
    return -(-n // step) * step


def chunk_size(q: torch.Tensor, scores: int, most: Optional[int] = None) -> int:
    """How many queries (B, n, T, hs), at most `most`, to process at once: all heads have about `scores` scores."""
    rows, n, total, _ = q.shape
    fitting = scores // (rows * n * rounded(total)) // ROUND * ROUND
    return max(min(fitting, most or rounded(total)), QUERIES)


@dataclass
class Scores:
    """How attention scores are computed from queries and keys.

    Args:
        scale: Their factor.
        softcap: A tanh keeps them between -softcap and softcap (https://arxiv.org/abs/2408.00118); None for no limit.
        window: Queries see this many keys, their own included; None for all up to their own.
        sinks: For each query head the score of a key that all queries see, whose value is zero; None for no such key.
    """

    scale: float
    softcap: Optional[float] = None
    window: Optional[int] = None
    sinks: Optional[torch.Tensor] = None

    @property
    def fused(self) -> bool:
        """Whether kernels that keep no scores can compute them."""
        return self.softcap is None and self.sinks is None

    def past(self, part: slice) -> slice:
        """The keys that any of these queries sees."""
        return slice(0 if self.window is None else max(0, part.start - self.window + 1), part.stop)


class CausalAttention(torch.autograd.Function):
    """Causal attention, a chunk of queries and the keys that they see at a time. Lengths are padded to `rounded` ones.
    Unless they are to be kept, the attention weights are recomputed in the backward pass, so that memory grows with the
    number of tokens, not with the square."""

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, chunk: int, keep: bool = False
    ) -> torch.Tensor:
        return cls.apply(q.to(v.dtype), k.to(v.dtype), v, scores.sinks, scores, chunk, keep)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        """`q` is (B, n, T, hs); `k` and `v` are (B, g, T, hs). Returns (B, n, T, hs), in memory order (B, T, n, hs).
        Heads of values may have another size, which is then that of the result."""
        *inputs, sinks, ctx.scores, ctx.chunk, keep = args
        scores, chunk = ctx.scores, ctx.chunk
        rows, n, total, _ = inputs[0].shape
        q, k, v = map(padded, inputs)
        values = v.flatten(0, 1)  # (B g, T, hs)
        kept: list[Optional[torch.Tensor]] = []
        y = q.new_empty(rows, q.size(2), n, v.size(-1)).transpose(1, 2)
        with no_autocast(q):
            for part in chunks(q, chunk):
                weights, slope = attention_weights(q, k, part, scores)
                seen = values[:, scores.past(part)]
                y[:, :, part] = (weights[..., : seen.size(1)] @ seen).view(rows, n, -1, v.size(-1))
                if keep:
                    kept += weights, slope
        ctx.save_for_backward(*inputs, sinks, *kept)
        return y[:, :, :total]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        q, k, v, sinks, *kept = ctx.saved_tensors
        q, k, v, grad_y = map(padded, (q, k, v, *grads))
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        grad_sinks = None if sinks is None else torch.zeros(len(sinks), dtype=torch.float32, device=q.device)
        for i, part in enumerate(chunks(q, ctx.chunk)):
            past, grad = ctx.scores.past(part), grouped(grad_y[:, :, part], k)
            weights, slope = kept[2 * i : 2 * i + 2] or attention_weights(q, k, part, ctx.scores)
            weights, of_sinks = weights.tensor_split([past.stop - past.start], -1)
            grad_v[:, past].baddbmm_(weights.transpose(1, 2), grad)
            grad_weights = grad @ values[:, past].transpose(1, 2)
            if grad_sinks is not None:
                grad_sink = torch.linalg.vecdot(grad_weights.float(), weights.float()).mul_(of_sinks[..., 0])
                grad_sinks -= grad_sink.view(len(q), q.size(1), -1).sum((0, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, q.dtype).mul_(ctx.scores.scale)
            if slope is not None:
                grad_scores *= slope
            grad_q[:, :, part] = (grad_scores @ keys[:, past]).view_as(q[:, :, part])
            grad_k[:, past].baddbmm_(grad_scores.transpose(1, 2), grouped(q[:, :, part], k))
        real = slice(grads[0].size(2))
        if grad_sinks is not None:
            grad_sinks = grad_sinks.to(sinks.dtype)
        grads = grad_q, grad_k.view_as(k), grad_v.view_as(v)
        return *(grad[:, :, real] for grad in grads), grad_sinks, None, None, None


def padded(x: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, hs) padded to a `rounded` T: keys that are in the future of every query."""
    padding = rounded(x.size(2)) - x.size(2)
    return F.pad(x, (0, 0, 0, padding)) if padding else x


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    return nullcontext() if autocast_dtype(x.device) is None else torch.autocast(x.device.type, enabled=False)


def chunks(q: torch.Tensor, size: int) -> list[slice]:
    return [slice(start, min(start + size, q.size(2))) for start in range(0, q.size(2), size)]


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, part: slice, how: Scores
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The attention weights of a chunk of the queries (B, n, T, hs), (B g, n / g queries, keys that they see, and the
    sink if there is one). With a soft cap also the derivative of the capped scores, 1 - tanh^2, in the shape without
    the sink. `k` is (B, g, T, hs)."""
    past, new, slope = how.past(part), part.stop - part.start, None
    keys = k.flatten(0, 1)[:, past]
    scores = torch.bmm(grouped(q[:, :, part], k), keys.transpose(1, 2)).mul_(how.scale)
    if how.softcap is not None:
        scores.div_(how.softcap).tanh_()
        slope = 1 - scores.square()
        scores *= how.softcap
    last = part.start - past.start  # the key of the first query
    grid = scores.view(len(keys), -1, new, keys.size(1))
    grid[..., last:] += torch.full((new, new), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    if how.window is not None and last + new > how.window:
        grid += torch.full(grid.shape[-2:], -torch.inf, dtype=q.dtype, device=q.device).tril_(last - how.window)
    if how.sinks is not None:
        scores = with_sinks(grid.view(len(q), q.size(1), new, -1), how.sinks[:, None, None])
        scores = scores.view(len(keys), -1, scores.size(3))
    return scores.softmax(-1), slope


def with_sinks(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Scores (..., S) with those of the sinks, (..., 1), in another column."""
    return torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)


def grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """From (B, n, T, hs) to (B g, n / g T, hs): one matrix of queries for each of the g heads of `k`."""
    return x.unflatten(1, (k.size(1), -1)).flatten(2, 3).flatten(0, 1)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor], how: Scores
) -> torch.Tensor:
    """Attention with a soft cap or sinks. `q` is (B, n, T, hs), `k` and `v` (B, g, S, hs). `mask` is true where a token
    is visible: (T, S), or (B, 1, 1, S)."""
    rows = max(1, PLAIN_SCORES // (len(q) * q.size(1) * k.size(2)))
    if mask is not None and mask.dim() == 2 and q.size(2) > rows:
        parts = zip(q.split(rows, dim=2), mask.split(rows))
        return torch.cat([plain_attention(part, k, v, visible, how) for part, visible in parts], dim=2)
    if mask is not None and mask.dim() == 4:
        mask = mask[:, None]
    q = q.unflatten(1, (k.size(1), -1))  # (B, g, n / g, T, hs)
    scores = q @ k[:, :, None].transpose(-1, -2) * (how.scale / (how.softcap or 1))
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if how.sinks is not None:  # a head's are those of its queries, or of its groups of queries
        scores = with_sinks(scores, how.sinks.view(k.size(1), q.size(2), -1, 1))
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)[..., : k.size(2)]
    return (weights @ v[:, :, None]).flatten(1, 2)


def join(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs (B, n, some of T, hs) to (B, n, T, hs), in memory order (B, T, n, hs)."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([y.transpose(1, 2) for y in outputs], dim=1).transpose(1, 2)
