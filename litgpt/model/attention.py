"""Causal self-attention over sequences packed end to end, or over a cache.

Shapes: B rows, T tokens, S tokens that they may attend to, n query heads, g key-value heads, hs head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Optional

import torch
from torch import nn

from litgpt.model.attention_kernels import (
    causal_attention,
    continued_attention,
    masked_attention,
    one_query_attention,
    packed_attention,
    single_attention,
)
from litgpt.model.chunked_attention import Scores, join
from litgpt.model.config import LATENT, Config
from litgpt.model.kernels import remat, rms_norm
from litgpt.model.kv_cache import EachRow, KVCache, Pair
from litgpt.model.linear import Linear
from litgpt.model.norm import RMSNorm, make_qk_norm
from litgpt.model.packing import Packing
from litgpt.model.rope import CosSin, apply_rope

CHUNK = 256  # queries that a layer with a smaller window processes at once


@dataclass
class ForwardContext:
    """What all layers share during one forward pass. Masks are true where a key is visible."""

    packing: Packing  # of the new tokens
    ropes: list[CosSin]  # cosines and sines of each rope of the model
    cache: Optional[KVCache] = None  # keys and values of the tokens before
    rows: Sequence[int] = ()  # the cache row that each sequence continues
    each: Optional[EachRow] = None  # where new tokens are cached, if each sequence is one token of its own row
    query_scale: Optional[torch.Tensor] = None  # of each token, (T, 1)
    per_layer: Optional[torch.Tensor] = None  # see `PerLayerInputs`
    lent: dict[int, list[Pair]] = field(default_factory=dict)  # keys and values, by layer, that later layers use too
    masks: dict[int, torch.Tensor] = field(default_factory=dict)  # by window; 0 for no window

    @cached_property
    def past(self) -> int:
        """The number of cached tokens of the longest row."""
        return max((self.cache.length(row) for row in self.rows), default=0) if self.cache is not None else 0

    def causal_mask(self, new: int, total: int) -> torch.Tensor:
        """The mask for the last `new` of `total` tokens, (new, total)."""
        longest = self.packing.longest
        if 0 not in self.masks:
            self.masks[0] = all_visible(longest, self.past + longest, self.packing.positions.device).tril(self.past)
        first = self.past - (total - new)
        return self.masks[0][:new, first : first + total]

    def window_mask(self, window: int) -> torch.Tensor:
        """The mask for a chunk of queries: row i sees the columns i to i + window - 1."""
        if window not in self.masks:
            rows = min(self.packing.longest, max(window, CHUNK))
            visible = all_visible(rows, rows + window - 1, self.packing.positions.device)
            self.masks[window] = visible.triu().tril(window - 1)
        return self.masks[window]


class Sinks(nn.Module):
    """The scores of attention sinks, (n,): each head can attend to nothing (https://arxiv.org/abs/2309.17453)."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_head))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention; `qkv` fuses the query, key and value projections, in this order."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.source = layer, config.kv_source(layer)
        later = range(layer + 1, config.n_layer) if config.kv_shared_layers else ()
        self.lends = any(config.kv_source(other) == layer for other in later)
        self.config = config = config.of_layer(layer)
        self.add_projections(config)  # first, as the random numbers of a method and its optimizer follow this order
        self.proj = Linear(config.n_head * config.value_size, config.n_embd, bias=bool(config.attn_proj_bias))
        if config.norm_qk:
            self.norm_q = make_qk_norm(config, config.n_head)
            self.norm_k = make_qk_norm(config, config.n_query_groups) if self.source == layer else nn.Identity()
        self.rope = config.rope_kind(layer)
        self.n_groups = config.n_query_groups if self.source == layer else 0
        scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        self.without_sinks = Scores(scale, config.attention_logit_softcapping, config.window(layer))
        self.sinks = Sinks(config.n_head) if config.attention_sinks else None
        self.prefix: Optional[nn.Module] = None  # set by litgpt.methods.adapter

    def add_projections(self, config: Config) -> None:
        self.qkv = Linear(config.n_embd, sum(config.projection_sizes), bias=bool(config.attn_bias))
        self.qkv.parts = config.projection_sizes  # type: ignore[assignment]

    @property
    def scores(self) -> Scores:
        return replace(self.without_sinks, sinks=self.sinks.weight) if self.sinks is not None else self.without_sinks

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        rope = context.ropes[self.rope] if self.rope is not None else ()
        q, k, v, *gate = self.project(x, *rope)
        if context.query_scale is not None:
            q = q * context.query_scale
        y = self.attend_within_sequences(q, k, v, context)
        if self.prefix is not None:
            y = y + self.prefix(q, *self.prefix_projection())
        y = y.transpose(1, 2)
        return self.proj((remat(y, gated, *gate) if gate else y).flatten(2))  # (B, T, n_embd)

    def prefix_projection(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, int, int]]:
        """What computes the keys and values of a prefix, side by side after queries, and their numbers of features."""
        return self.project_all, self.config.qkv_sizes

    def project_all(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values side by side."""
        qkv = self.qkv(x)
        if len(self.config.projection_sizes) != 2:
            return qkv
        return torch.cat([qkv, qkv[..., -self.config.qkv_sizes[1] :]], dim=-1)

    def project(self, x: torch.Tensor, *rope: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, (B, n or g, T, hs), in memory order (B, T, heads, hs), and the gate of the result
        if there is one, (B, T, n, hs)."""
        config = self.config
        gate: tuple[torch.Tensor, ...] = ()
        qkv = self.project_all(x).unflatten(2, (-1, config.head_size))  # (B, T, n + 2 g, hs)
        if config.attention_gate:  # the gate of a head follows its query
            q, kv = qkv.split_with_sizes([2 * config.n_head, 2 * self.n_groups], dim=2)
            qkv, gate = torch.cat([q[:, :, ::2], kv], dim=2), (q[:, :, 1::2],)
        qk, v = qkv.split_with_sizes([config.n_head + self.n_groups, self.n_groups], dim=2)
        qk = remat(qk, self.normalize_and_rotate, *rope)
        q, k = qk.transpose(1, 2).split_with_sizes([config.n_head, self.n_groups], dim=1)
        v = self.clip(v)
        if config.norm_v:
            v = remat(v, rms_norm, v.new_ones(config.value_size), config.norm_eps)
        return q, k, v.transpose(1, 2), *gate

    def normalize_and_rotate(self, qk: torch.Tensor, *rope: torch.Tensor) -> torch.Tensor:
        """Queries and keys, (B, T, n + g, hs), with the norms and the rope of this layer, if it has them."""
        if self.config.norm_qk and not self.config.norm_qk_after_rope:
            qk = self.normalize(qk)
        qk = self.clip(qk)
        if rope:
            cos, sin = rope
            qk = apply_rope(qk, cos, sin, self.config.rope_interleave)
        return self.normalize(qk) if self.config.norm_qk and self.config.norm_qk_after_rope else qk

    def clip(self, x: torch.Tensor) -> torch.Tensor:
        largest = self.config.clip_qkv
        return x if largest is None else x.clamp(-largest, largest)

    def normalize(self, qk: torch.Tensor) -> torch.Tensor:
        q, k = qk.split_with_sizes([self.config.n_head, self.n_groups], dim=2)
        if self.config.norm_qk_type == "olmo2":
            q, k = (norm(t.flatten(2)).view(t.shape) for norm, t in ((self.norm_q, q), (self.norm_k, k)))
        else:
            q, k = self.norm_q(q), self.norm_k(k)
        return torch.cat([q, k], dim=2)

    def attend_within_sequences(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Attention within each of the sequences, and to their cached tokens. Shapes as in `attend`."""
        cache = context.cache
        if self.source != self.layer:
            pairs = [(k.to(q.device), v.to(q.device)) for k, v in context.lent[self.source]]
        else:
            pairs = self.extended(k, v, context)
        if self.lends:
            context.lent[self.layer] = pairs
        k, v = pairs[0]
        if cache is None:
            if len(v) == 1:
                return packed_attention(q, k, v, self.scores, context.packing)
            return causal_attention(q, k, v, self.scores)
        if context.each is not None:
            y = single_attention(q.permute(2, 1, 0, 3).to(k.dtype), k, v, self.scores, context.each)  # (T, n, 1, hs)
            return y.permute(2, 1, 0, 3).to(q.dtype)
        queries = q.split_with_sizes(context.packing.seqlens, dim=2)
        return join([self.attend(q.to(k.dtype), k, v, context).to(q.dtype) for q, (k, v) in zip(queries, pairs)])

    def extended(self, k: torch.Tensor, v: torch.Tensor, context: ForwardContext) -> list[Pair]:
        """The keys and values that the tokens may attend to: for each sequence, if there is a cache, where the new ones
        are added; else, and for single tokens, one pair for all."""
        cache = context.cache
        if cache is None:
            return [(k, v)]
        if context.each is not None:
            return [cache.append_to_each(self.layer, context.each, *(t[0].transpose(0, 1) for t in (k, v)))]
        pairs = []
        sequences = zip(*(t.split_with_sizes(context.packing.seqlens, dim=2) for t in (k, v)))
        for row, (k, v) in zip(context.rows, sequences):
            keys, values = cache.append(self.layer, row, k, v)
            pairs.append((keys, values) if keys.size(2) > k.size(2) or k.size(2) == 1 else (k, v))
        return pairs

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Causal attention of the last T of S tokens, within the window. `q` and the result are (B, n, T, hs), `k` and
        `v` (B, g, S, hs), all in memory order (B, T, heads, hs)."""
        new, total, scores = q.size(2), k.size(2), self.scores
        if new == 1:
            return one_query_attention(q, k, v, scores)
        if new == total:
            return causal_attention(q, k, v, scores)
        if (y := continued_attention(q, k, v, scores)) is not None:
            return y
        if scores.window is None or total <= scores.window:
            return masked_attention(q, k, v, scores, context.causal_mask(new, total))
        window, size = scores.window, max(scores.window, CHUNK)
        visible, outputs = context.window_mask(window), []
        for start in range(0, new, size):  # a chunk of queries, and the keys that any of them sees
            chunk = q[:, :, start : start + size]
            rows, end = chunk.size(2), total - new + start + chunk.size(2)
            first = max(0, end - rows - window + 1)
            column = window - 1 - (end - rows - first)
            mask = visible[:rows, column : column + end - first]
            outputs.append(masked_attention(chunk, k[:, :, first:end], v[:, :, first:end], scores, mask))
        return join(outputs)


class MultiheadLatentAttention(CausalSelfAttention):
    """Attention whose queries, keys and values are expanded from latents, which are smaller
    (https://arxiv.org/abs/2405.04434). A part of a head rotates; that of the keys is the same for all heads. What is
    cached are the expanded keys and values. Heads of values have a size of their own."""

    def add_projections(self, config: Config) -> None:
        latent, bias = config.latent_attention or {}, bool(config.attn_bias)
        self.q_rank, self.kv_rank, self.rotating, self.still, size = (latent[name] for name in LATENT)
        eps, n = config.latent_norm_eps or config.norm_eps, config.n_head
        if self.q_rank is None:
            self.q_proj = Linear(config.n_embd, n * config.head_size, bias=False)
        else:
            self.q_a_proj = Linear(config.n_embd, self.q_rank, bias=bias)
            self.q_a_norm = RMSNorm(self.q_rank, eps)
            self.q_b_proj = Linear(self.q_rank, n * config.head_size, bias=False)
        self.kv_a_proj_with_mqa = Linear(config.n_embd, self.kv_rank + self.rotating, bias=bias)
        self.kv_a_norm = RMSNorm(self.kv_rank, eps)
        self.kv_b_proj = Linear(self.kv_rank, n * (self.still + size), bias=False)

    def project(self, x: torch.Tensor, *rope: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = remat(q.unflatten(-1, (self.n_groups, -1)), self.rotate, *rope)
        k, v = self.expand(x, *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def expand(self, x: torch.Tensor, *rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (B, T, n, hs)."""
        latent, shared = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rotating], dim=-1)
        kv = self.kv_b_proj(self.kv_a_norm(latent)).unflatten(-1, (self.n_groups, -1))
        return remat(kv, self.keys, shared, *rope), kv[..., self.still :]

    def keys(self, kv: torch.Tensor, shared: torch.Tensor, *rope: torch.Tensor) -> torch.Tensor:
        shared = shared.unsqueeze(-2).expand(*kv.shape[:-1], -1)
        return self.rotate(torch.cat([kv[..., : self.still], shared], dim=-1), *rope)

    def rotate(self, x: torch.Tensor, *rope: torch.Tensor) -> torch.Tensor:
        """Heads (B, T, n, hs) with their last dimensions rotated."""
        if not rope:
            return x
        still, rotating = x.split([self.still, self.rotating], dim=-1)
        return torch.cat([still, apply_rope(rotating, rope[0], rope[1], self.config.rope_interleave)], dim=-1)

    def prefix_projection(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, int, int]]:
        def keys_and_values(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([t.flatten(-2) for t in self.expand(x)], dim=-1)

        return keys_and_values, (0, *self.config.qkv_sizes[1:])


def gated(y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return y * gate.sigmoid()


def all_visible(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device)
