"""Causal self-attention over documents laid end to end, or over a cache.

Shapes: B rows, T tokens, S tokens that they may see, n query heads, g key-value heads, hs head size.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Optional

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from litgpt.model.config import Config
from litgpt.model.kv_cache import EachRow, KVCache
from litgpt.model.linear import ROUND, Linear, rounded
from litgpt.model.norm import make_qk_norm
from litgpt.model.rope import CosSin, apply_rope

CHUNK = 256  # queries that a layer with a smaller window takes at once
QUERIES = (64, 256)  # that `CausalAttention` takes at once, at least and at most
SCORES = {
    torch.float32: 2**18,
    torch.bfloat16: 2**20,
}  # of all heads that it likes to have at once: they stay in a cache
SHORT = 2**19  # scores of all heads up to which it keeps its weights for the backward pass


@dataclass
class ForwardContext:
    """What all layers of one forward share.

    Args:
        documents: Lengths of the documents that lie end to end in T.
        ropes: Cosines and sines of each rope of the model.
        cache: Tokens that were read before.
        rows: The row of the cache that each document continues.
        causal: True where a token sees another, for layers without a window: of `past` older tokens and the new ones.
            A part of it is that of a shorter document. None where no layer needs it.
        band: The same for a chunk of queries and the keys that a window shows them: row i sees the columns from i to
            i + window - 1.
        each: Where the documents are single tokens of several rows, how they go into the cache.
        seen: The same, what each sees: (B, 1, 1, S); None where all see everything.
    """

    seqlens: list[int]
    ropes: list[CosSin]
    cache: Optional[KVCache] = None
    rows: Sequence[int] = ()
    past: int = 0
    causal: Optional[torch.Tensor] = None
    band: Optional[torch.Tensor] = None
    each: Optional[EachRow] = None
    seen: Optional[torch.Tensor] = None
    _cu_seqlens: Optional[torch.Tensor] = None

    def make_masks(self, config: Config, device: torch.device) -> None:
        """Make the masks that some layer needs: those that are not just causal over all keys."""
        pasts = [self.cache.length(row) for row in self.rows] if self.cache is not None else [0] * len(self.seqlens)
        longest, self.past = max(self.seqlens), max(pasts)
        if longest == 1:
            if self.cache is not None and len(self.rows) > 1:
                self.each = self.cache.each_row(self.rows, device)
                if min(pasts) < self.past:
                    self.seen = torch.arange(self.past + 1, device=device) <= self.each.places[:, None, None, None]
            return
        windows = {config.window(layer) for layer in range(config.n_layer)}
        passed = {window for window in windows if window is not None and window < self.past + longest}
        within = any(past + new <= window for past, new in zip(pasts, self.seqlens) for window in passed)
        if self.past and (within or windows - passed):
            self.causal = self.visible(longest, self.past + longest, device).tril(self.past)
        for window in passed:
            rows = min(longest, max(window, CHUNK))
            self.band = self.visible(rows, rows + window - 1, device).triu().tril(window - 1)

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """Where the documents begin, and where the last one ends, (documents + 1,), int32."""
        if self._cu_seqlens is None:
            self._cu_seqlens = torch.tensor([0, *accumulate(self.seqlens)], dtype=torch.int32).to(device)
        return self._cu_seqlens

    @staticmethod
    def visible(rows: int, columns: int, device: torch.device) -> torch.Tensor:
        return torch.ones(rows, columns, dtype=torch.bool, device=device)

    def causal_part(self, new: int, total: int) -> Optional[torch.Tensor]:
        """What the last `new` of `total` tokens see, (new, total)."""
        if self.causal is None:
            return None
        first = self.past - (total - new)
        return self.causal[:new, first : first + total]


class CausalSelfAttention(nn.Module):
    """Grouped-query attention; `qkv` holds the query, key and value projections one below the other."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        assert config.head_size is not None and config.n_query_groups is not None
        self.config = config
        self.layer = layer
        self.qkv = Linear(config.n_embd, sum(config.qkv_sizes), bias=bool(config.attn_bias))
        self.qkv.parts = config.qkv_sizes  # type: ignore[assignment]
        self.proj = Linear(config.qkv_sizes[0], config.n_embd, bias=bool(config.attn_proj_bias))
        if config.norm_qk:
            self.norm_q = make_qk_norm(config, config.n_head)
            self.norm_k = make_qk_norm(config, config.n_query_groups)
        self.rope = config.rope_kind(layer)
        self.window = config.window(layer)
        self.softcap = config.attention_logit_softcapping
        self.n_groups = config.n_query_groups
        self.scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        self.prefix: Optional[nn.Module] = None  # litgpt.methods.adapter puts one here

    def forward(self, x: torch.Tensor, reading: ForwardContext) -> torch.Tensor:
        qk, v = self.heads(x)  # (B, T, n + g, hs), (B, T, g, hs)
        if self.rope is not None:
            qk = apply_rope(qk, *reading.ropes[self.rope])
        q, k = qk.transpose(1, 2).split_with_sizes([self.config.n_head, self.n_groups], dim=1)  # (B, n or g, T, hs)
        v = v.transpose(1, 2)
        y = self.attend_within_sequences(q, k, v, reading)
        if self.prefix is not None:
            y = y + self.prefix(q, self.qkv, self.config.qkv_sizes)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, n_embd)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys (B, T, n + g, hs), normalized where the config says so, and values (B, T, g, hs)."""
        config = self.config
        qkv = self.qkv(x)
        if config.clip_qkv is not None:
            qkv = qkv.clamp(-config.clip_qkv, config.clip_qkv)
        qkv = qkv.view(*x.shape[:-1], -1, config.head_size)
        qk, v = qkv.split_with_sizes([config.n_head + self.n_groups, self.n_groups], dim=2)
        if config.norm_qk:
            q, k = qk.split_with_sizes([config.n_head, self.n_groups], dim=2)
            if config.norm_qk_type == "olmo2":
                q, k = (norm(t.flatten(2)).view(t.shape) for norm, t in ((self.norm_q, q), (self.norm_k, k)))
            else:
                q, k = self.norm_q(q), self.norm_k(k)
            qk = torch.cat([q, k], dim=2)
        return qk, v

    def attend_within_sequences(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reading: ForwardContext
    ) -> torch.Tensor:
        """Attention within each of the documents, and to what was read of it before. Shapes as in `attend`."""
        cache = reading.cache
        if cache is not None and reading.each is not None:
            return self.attend_each(q, k, v, cache, reading.each, reading.seen)
        if cache is None and len(reading.seqlens) > 1 and len(v) == 1 and self.softcap is None and has_varlen(v):
            return self.attend_together(q, k, v, reading)
        seqlens = zip(*(t.split_with_sizes(reading.seqlens, dim=2) for t in (q, k, v)))
        if cache is None:
            return join([self.attend(q, k, v, reading) for q, k, v in seqlens])
        outputs = []
        for row, (q, k, v) in zip(reading.rows, seqlens):
            keys, values = cache.append(self.layer, row, k, v)
            if keys.size(2) > k.size(2) or k.size(2) == 1:
                k, v = keys, values
            outputs.append(self.attend(q.to(k.dtype), k, v, reading).to(q.dtype))
        return join(outputs)

    def attend_together(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reading: ForwardContext
    ) -> torch.Tensor:
        """All documents by one kernel. Shapes as in `attend`, B is 1."""
        ends, longest = reading.cu_seqlens(q.device), max(reading.seqlens)
        left = -1 if self.window is None else self.window - 1
        q, k, v = (t[0].transpose(0, 1).to(v.dtype) for t in (q, k, v))  # (T, n or g, hs)
        y = varlen()(  # type: ignore[misc]
            q, k, v, ends, ends, longest, longest, scale=self.scale, window_size=(left, 0), enable_gqa=True
        )
        return y.transpose(0, 1)[None]

    def attend_each(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        each: EachRow,
        seen: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Attention of one token of each of several texts to its text. Shapes as in `attend`, with T texts."""
        k, v = cache.append_to_each(self.layer, each, *(t[0].transpose(0, 1) for t in (k, v)))
        mask = seen[..., : k.size(2)] if seen is not None else None
        y = self.core(q.permute(2, 1, 0, 3).to(k.dtype), k, v, mask)  # (T, n, 1, hs)
        return y.permute(2, 1, 0, 3).to(q.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reading: ForwardContext) -> torch.Tensor:
        """Causal attention of the last T of S tokens, within the window.

        Args:
            q: (B, n, T, hs); `k` and `v` are (B, g, S, hs), all in memory order (B, T, heads, hs).

        Returns:
            (B, n, T, hs), in memory order (B, T, n, hs)
        """
        new, total, window = q.size(2), k.size(2), self.window
        if window is None or total <= window:
            mask = None if new in (1, total) else reading.causal_part(new, total)
            return self.core(q, k, v, mask)
        assert reading.band is not None
        outputs, size = [], max(window, CHUNK)
        for start in range(0, new, size):  # a chunk of queries, and the keys that one of them sees
            chunk = q[:, :, start : start + size]
            rows, end = chunk.size(2), total - new + start + chunk.size(2)
            first = max(0, end - rows - window + 1)
            column = window - 1 - (end - rows - first)
            mask = reading.band[:rows, column : column + end - first]
            outputs.append(self.core(chunk, k[:, :, first:end], v[:, :, first:end], mask))
        return join(outputs)

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """Attention where the mask is true; without one causal, or of a single token to all."""
        shape, causal = q.shape, mask is None and q.size(2) > 1
        if q.size(2) == 1:  # the heads that share keys become the tokens that see the same ones
            q = q.reshape(len(q), k.size(1), -1, q.size(3))
        if causal and (q.device.type == "cpu" or self.softcap is not None):
            y = CausalAttention.apply(q.to(v.dtype), k.to(v.dtype), v, self.scale, self.softcap)
        elif self.softcap is not None:
            y = softcapped_attention(q, k, v, mask, self.scale, self.softcap)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=True)
        return y.view(shape) if shape[2] == 1 else y


class CausalAttention(torch.autograd.Function):
    """Causal attention written out, a chunk of queries and the keys up to them at a time.

    On a CPU that takes two thirds of the time of torch's fused kernel in float32, and less than half in bfloat16; and
    no kernel of `F.scaled_dot_product_attention` knows scores that stay within a cap. Lengths are rounded up, as
    `linear.rounded` says. The weights of a long document are computed again in the backward pass, so that memory grows
    with its tokens, not with their square.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cap: Optional[float]
    ) -> torch.Tensor:
        """`q` is (B, n, T, hs); `k` and `v` are (B, g, T, hs). Gives (B, n, T, hs), in memory order (B, T, n, hs)."""
        rows, n, total, size = q.shape
        more = (0, 0, 0, rounded(total) - total)  # keys that are in everybody's future
        q, k, v = (F.pad(x, more) for x in (q, k, v))
        values = v.flatten(0, 1)  # (B g, T, hs)
        kept: list[Optional[torch.Tensor]] = []
        y = q.new_empty(rows, q.size(2), n, size).transpose(1, 2)
        with torch.autocast(q.device.type, enabled=False):
            for part in query_chunks(q):
                weights, slope = chunk_weights(q, k, part, scale, cap)
                y[:, :, part] = (weights @ values[:, : part.stop]).view(rows, n, -1, size)
                if n * total**2 <= SHORT:
                    kept += weights, slope
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.cap, ctx.total = scale, cap, total
        return y[:, :, :total]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        q, k, v, *kept = ctx.saved_tensors
        grad_y = F.pad(grads[0], (0, 0, 0, q.size(2) - ctx.total))
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        for i, part in enumerate(query_chunks(q)):
            seen, grad = slice(part.stop), grouped(grad_y[:, :, part], k)
            weights, slope = kept[2 * i : 2 * i + 2] or chunk_weights(q, k, part, ctx.scale, ctx.cap)
            grad_v[:, seen].baddbmm_(weights.transpose(1, 2), grad)
            grad_weights = grad @ values[:, seen].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, q.dtype).mul_(ctx.scale)
            if slope is not None:
                grad_scores *= slope
            grad_q[:, :, part] = (grad_scores @ keys[:, seen]).view_as(q[:, :, part])
            grad_k[:, seen].baddbmm_(grad_scores.transpose(1, 2), grouped(q[:, :, part], k))
        real = slice(ctx.total)
        return grad_q[:, :, real], grad_k.view_as(k)[:, :, real], grad_v.view_as(v)[:, :, real], None, None


def has_varlen(x: torch.Tensor) -> bool:
    """Whether torch has a kernel for documents of any lengths laid end to end, for tensors like this, (..., hs)."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or x.size(-1) % 8 or x.size(-1) > 128:
        return False  # larger heads have no backward pass on every GPU
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and varlen() is not None


@cache
def varlen() -> Optional[Callable[..., Any]]:
    """torch's function for it; None where this torch's does not know windows, scales and groups."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def query_chunks(q: torch.Tensor) -> list[slice]:
    """The queries (B, n, T, hs), some at a time."""
    least, most = QUERIES if q.is_cpu else (QUERIES[0], q.size(2))  # on a GPU few large products are faster
    fit = (SCORES.get(q.dtype, 0) if q.is_cpu else 2**26) // q.shape[:3].numel() // ROUND * ROUND
    size = max(min(fit, most), least)
    return [slice(start, min(start + size, q.size(2))) for start in range(0, q.size(2), size)]


def chunk_weights(
    q: torch.Tensor, k: torch.Tensor, part: slice, scale: float, cap: Optional[float]
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """How much each query of a chunk takes of each key up to its own, (B g, n / g queries, keys); and where the scores
    have a cap, how fast they still rise, 1 - tanh^2, in the same shape.

    Args:
        q: (B, n, T, hs); `k` is (B, g, T, hs).
    """
    keys, new, slope = k.flatten(0, 1)[:, : part.stop], part.stop - part.start, None
    scores = torch.bmm(grouped(q[:, :, part], k), keys.transpose(1, 2)).mul_(scale)
    if cap is not None:
        scores.div_(cap).tanh_()
        slope = 1 - scores.square()
        scores *= cap
    future = torch.full((new, new), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    scores.view(len(keys), -1, new, part.stop)[..., part] += future
    return scores.softmax(-1), slope


def grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """From (B, n, T, hs) to (B g, n / g T, hs), so that each of the g heads of `k` has its queries in one matrix."""
    return x.unflatten(1, (k.size(1), -1)).flatten(2, 3).flatten(0, 1)


def softcapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor], scale: float, cap: float
) -> torch.Tensor:
    """Attention whose scores stay within -cap and cap by a tanh (https://arxiv.org/abs/2408.00118).

    Args:
        q: (B, n, T, hs); `k` and `v` are (B, g, S, hs).
        mask: True where a token is seen, (T, S), or (B, 1, 1, S) for each text.
    """
    if mask is not None and mask.dim() == 4:
        mask = mask[:, None]
    q = q.unflatten(1, (k.size(1), -1))  # (B, g, n / g, T, hs)
    scores = cap * torch.tanh(q @ k[:, :, None].transpose(-1, -2) * (scale / cap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def join(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs (B, n, some of T, hs) to (B, n, T, hs), in memory order (B, T, n, hs)."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([y.transpose(1, 2) for y in outputs], dim=1).transpose(1, 2)
