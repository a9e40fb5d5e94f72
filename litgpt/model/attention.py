"""Causal self-attention over sequences packed end to end, or over a cache.

Shapes: B rows, T tokens, S tokens that they may attend to, n query heads, g key-value heads, hs head size.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model.chunked_attention import softcapped_attention
from litgpt.model.config import Config
from litgpt.model.kernels import causal_attention, remat
from litgpt.model.kv_cache import EachRow, KVCache
from litgpt.model.linear import Linear
from litgpt.model.norm import make_qk_norm
from litgpt.model.rope import CosSin, apply_rope

CHUNK = 256  # queries that a layer with a smaller window processes at once


@dataclass
class ForwardContext:
    """What all layers share during one forward pass. Masks are true where a key is visible; None if not needed."""

    seqlens: list[int]  # lengths of the sequences that are packed end to end in T
    ropes: list[CosSin]  # cosines and sines of each rope of the model
    cache: Optional[KVCache] = None  # keys and values of the tokens before
    rows: Sequence[int] = ()  # the cache row that each sequence continues
    past: int = 0  # the number of cached tokens of the longest row
    causal_mask: Optional[torch.Tensor] = None  # without a window: (longest, past + longest sequence), or a part of it
    window_mask: Optional[torch.Tensor] = None  # of a chunk of queries: row i sees the columns i to i + window - 1
    each: Optional[EachRow] = None  # where new tokens are cached, if each sequence is one token of its own row
    padding_mask: Optional[torch.Tensor] = None  # in that case, (B, 1, 1, S)
    _cu_seqlens: Optional[torch.Tensor] = None

    def make_masks(self, config: Config, device: torch.device) -> None:
        """Make the masks that some layer needs: those that are not just causal over all keys."""
        pasts = [self.cache.length(row) for row in self.rows] if self.cache is not None else [0] * len(self.seqlens)
        longest, self.past = max(self.seqlens), max(pasts)
        if longest == 1:
            if self.cache is not None and len(self.rows) > 1:
                self.each = self.cache.each_row(self.rows, device)
                if min(pasts) < self.past:
                    positions = torch.arange(self.past + 1, device=device)
                    self.padding_mask = positions <= self.each.positions[:, None, None, None]
            return
        windows = {config.window(layer) for layer in range(config.n_layer)}
        exceeded = {window for window in windows if window is not None and window < self.past + longest}
        within = any(past + new <= window for past, new in zip(pasts, self.seqlens) for window in exceeded)
        if self.past and (within or windows - exceeded):
            self.causal_mask = all_visible(longest, self.past + longest, device).tril(self.past)
        for window in exceeded:
            rows = min(longest, max(window, CHUNK))
            self.window_mask = all_visible(rows, rows + window - 1, device).triu().tril(window - 1)

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """Where the sequences begin, and where the last one ends, (sequences + 1,), int32."""
        if self._cu_seqlens is None:
            self._cu_seqlens = torch.tensor([0, *accumulate(self.seqlens)], dtype=torch.int32).to(device)
        return self._cu_seqlens

    def causal_mask_of(self, new: int, total: int) -> Optional[torch.Tensor]:
        """The mask for the last `new` of `total` tokens, (new, total)."""
        if self.causal_mask is None:
            return None
        first = self.past - (total - new)
        return self.causal_mask[:new, first : first + total]


class CausalSelfAttention(nn.Module):
    """Grouped-query attention; `qkv` fuses the query, key and value projections, in this order."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
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
        self.prefix: Optional[nn.Module] = None  # set by litgpt.methods.adapter

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        config = self.config
        qkv = self.qkv(x)
        if config.clip_qkv is not None:
            qkv = qkv.clamp(-config.clip_qkv, config.clip_qkv)
        qkv = qkv.unflatten(2, (-1, config.head_size))  # (B, T, n + 2 g, hs)
        qk, v = qkv.split_with_sizes([config.n_head + self.n_groups, self.n_groups], dim=2)
        qk = remat(qk, self.normalize_and_rotate, *(context.ropes[self.rope] if self.rope is not None else ()))
        q, k = qk.transpose(1, 2).split_with_sizes([config.n_head, self.n_groups], dim=1)  # (B, n or g, T, hs)
        v = v.transpose(1, 2)
        y = self.attend_within_sequences(q, k, v, context)
        if self.prefix is not None:
            y = y + self.prefix(q, self.qkv, config.qkv_sizes)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, n_embd)

    def normalize_and_rotate(self, qk: torch.Tensor, *rope: torch.Tensor) -> torch.Tensor:
        """Queries and keys, (B, T, n + g, hs), with the norms and the rope of this layer, if it has them."""
        if self.config.norm_qk:
            q, k = qk.split_with_sizes([self.config.n_head, self.n_groups], dim=2)
            if self.config.norm_qk_type == "olmo2":
                q, k = (norm(t.flatten(2)).view(t.shape) for norm, t in ((self.norm_q, q), (self.norm_k, k)))
            else:
                q, k = self.norm_q(q), self.norm_k(k)
            qk = torch.cat([q, k], dim=2)
        return apply_rope(qk, *rope) if rope else qk

    def attend_within_sequences(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Attention within each of the sequences, and to their cached tokens. Shapes as in `attend`."""
        cache = context.cache
        if context.each is not None:
            return self.attend_single_tokens(q, k, v, context)
        if cache is None and len(context.seqlens) > 1 and len(v) == 1 and self.softcap is None and has_varlen(v):
            return self.attend_varlen(q, k, v, context)
        sequences = zip(*(t.split_with_sizes(context.seqlens, dim=2) for t in (q, k, v)))
        if cache is None:
            return join([self.attend(q, k, v, context) for q, k, v in sequences])
        outputs = []
        for row, (q, k, v) in zip(context.rows, sequences):
            keys, values = cache.append(self.layer, row, k, v)
            if keys.size(2) > k.size(2) or k.size(2) == 1:
                k, v = keys, values
            outputs.append(self.attend(q.to(k.dtype), k, v, context).to(q.dtype))
        return join(outputs)

    def attend_varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """All sequences by one kernel. Shapes as in `attend`, B is 1."""
        cu_seqlens, max_seqlen = context.cu_seqlens(q.device), max(context.seqlens)
        left = -1 if self.window is None else self.window - 1
        q, k, v = (t[0].transpose(0, 1).to(v.dtype) for t in (q, k, v))  # (T, n or g, hs)
        lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
        y = varlen()(q, k, v, *lengths, scale=self.scale, window_size=(left, 0), enable_gqa=True)  # type: ignore[misc]
        return y.transpose(0, 1)[None]

    def attend_single_tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Attention of one token of each of T sequences to its own sequence. Shapes as in `attend`, B is 1."""
        assert context.cache is not None and context.each is not None
        k, v = context.cache.append_to_each(self.layer, context.each, *(t[0].transpose(0, 1) for t in (k, v)))
        mask = context.padding_mask[..., : k.size(2)] if context.padding_mask is not None else None
        y = self.core(q.permute(2, 1, 0, 3).to(k.dtype), k, v, mask)  # (T, n, 1, hs)
        return y.permute(2, 1, 0, 3).to(q.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Causal attention of the last T of S tokens, within the window. `q` and the result are (B, n, T, hs), `k` and
        `v` (B, g, S, hs), all in memory order (B, T, heads, hs)."""
        new, total, window = q.size(2), k.size(2), self.window
        if window is None or total <= window:
            mask = None if new in (1, total) else context.causal_mask_of(new, total)
            return self.core(q, k, v, mask)
        assert context.window_mask is not None
        outputs, size = [], max(window, CHUNK)
        for start in range(0, new, size):  # a chunk of queries, and the keys that any of them sees
            chunk = q[:, :, start : start + size]
            rows, end = chunk.size(2), total - new + start + chunk.size(2)
            first = max(0, end - rows - window + 1)
            column = window - 1 - (end - rows - first)
            mask = context.window_mask[:rows, column : column + end - first]
            outputs.append(self.core(chunk, k[:, :, first:end], v[:, :, first:end], mask))
        return join(outputs)

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """Attention where the mask is true. Without a mask: causal, or of a single token to all keys."""
        shape = q.shape
        if q.size(2) == 1:  # a single token: the heads that share keys become the queries of one head
            q = q.reshape(len(q), k.size(1), -1, q.size(3))
        elif mask is None:
            return causal_attention(q, k, v, self.scale, self.softcap)
        if self.softcap is not None:
            y = softcapped_attention(q, k, v, mask, self.scale, self.softcap)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)
        return y.view(shape) if shape[2] == 1 else y


def has_varlen(x: torch.Tensor) -> bool:
    """Whether torch has a kernel for packed sequences, forward and backward, for tensors like this one, (..., hs)."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or x.size(-1) % 8 or x.size(-1) > 128:
        return False  # larger heads have no backward pass on some GPUs
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and varlen() is not None


@cache
def varlen() -> Optional[Callable[..., Any]]:
    """`varlen_attn`; None if this version of torch has none with windows, scales and groups."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def all_visible(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device)


def join(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs (B, n, some of T, hs) to (B, n, T, hs), in memory order (B, T, n, hs)."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([y.transpose(1, 2) for y in outputs], dim=1).transpose(1, 2)
