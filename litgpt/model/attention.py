"""Causal self-attention over documents laid end to end, or over a cache.

Shapes: B rows, T tokens, n query heads, g key-value heads, hs head size.
"""

from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.config import Config
from litgpt.model.kv_cache import KVCache
from litgpt.model.rope import apply_rope

Rope = tuple[torch.Tensor, torch.Tensor]


class CausalSelfAttention(nn.Module):
    """Grouped-query attention; `qkv` holds the query, key and value projections one below the other."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.qkv = nn.Linear(config.n_embd, sum(config.qkv_sizes), bias=bool(config.attn_bias))
        self.qkv.parts = config.qkv_sizes  # type: ignore[assignment]
        self.proj = nn.Linear(config.qkv_sizes[0], config.n_embd, bias=bool(config.attn_proj_bias))
        self.prefix: Optional[nn.Module] = None  # litgpt.adapter puts one here

    def forward(
        self, x: torch.Tensor, rope: Rope, documents: Optional[list[int]], cache: Optional[KVCache]
    ) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (-1, self.config.head_size)) for t in self.qkv(x).split(self.config.qkv_sizes, dim=-1)
        )  # (B, T, n or g, hs)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n or g, T, hs)
        if cache is not None:
            y = attend_to_cache(q, *cache.append(self.layer, k, v))
        else:
            y = attend(q, k, v, documents or [x.size(1)])
        if self.prefix is not None:
            y = y + self.prefix(q, self.qkv, self.config.qkv_sizes)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, n_embd)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: list[int]) -> torch.Tensor:
    """Causal attention within each of the documents whose lengths fill the T tokens.

    Args:
        q: (B, n, T, hs); `k` and `v` are (B, g, T, hs), all in memory order (B, T, heads, hs).

    Returns:
        (B, n, T, hs), in memory order (B, T, n, hs)
    """
    parts = (t.split(documents, dim=2) for t in (q, k, v))
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in zip(*parts)]
    return outputs[0] if len(outputs) == 1 else torch.cat([y.transpose(1, 2) for y in outputs], dim=1).transpose(1, 2)


def attend_to_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last T tokens, `q` (B, n, T, hs), to all S tokens, `k` and `v` (B, g, S, hs)."""
    new, total = q.size(2), k.size(2)
    mask = None
    if 1 < new < total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < new == total, enable_gqa=True)
