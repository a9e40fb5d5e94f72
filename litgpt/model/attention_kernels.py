"""Attention: which kernel computes it. Each operation is what a GPU runs; `kernels_cpu` has the versions for a CPU.

Shapes: B rows, T tokens, S tokens that they may attend to, n query heads, g key-value heads, hs head size.
"""

import inspect
from functools import cache
from typing import Any, Optional, Union

import torch
from torch.nn import functional as F

from litgpt.model.chunked_attention import CausalAttention, Scores, chunk_size, plain_attention
from litgpt.model.kernels import operation, remat
from litgpt.model.kv_cache import EachRow
from litgpt.model.packing import Packing

SCORES = 2**26  # attention scores of all heads that are computed at once: a GPU prefers few, large matmuls
SMALL_BACKWARD = {(8, 6), (8, 9), (12, 0)}  # GPUs with too little shared memory for some head sizes


@operation
def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Causal attention of sequences of one length to themselves. `q` and the result are (B, n, T, hs), `k` and `v` (B,
    g, T, hs)."""
    total = q.size(2)
    if scores.fused and (scores.window is None or total <= scores.window):
        return fused_attention(q, k, v, scores.scale, causal=True)
    if scores.fused and len(q) == 1 and has_varlen(q, v):
        ends = torch.arange(2, dtype=torch.int32, device=q.device) * total
        return varlen_attention(q, k, v, scores, ends, total)
    return CausalAttention.of(q, k, v, scores, chunk_size(q, SCORES))


@operation
def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, packing: Packing
) -> torch.Tensor:
    """Causal attention of each of several sequences to itself. Shapes as in `causal_attention`, B is 1. One kernel for
    all of them; where there is none, they become the rows of a padded batch."""
    if len(packing.seqlens) == 1:
        return causal_attention(q, k, v, scores)
    if scores.fused and has_varlen(q, v):
        return varlen_attention(q, k, v, scores, packing.cu_seqlens, packing.longest)
    rows, places = packing.padded
    q, k, v = (remat(x, to_rows, rows) for x in (q, k, v))
    y = causal_attention(q, k, v, scores)  # (sequences, n, longest, hs)
    return y.transpose(1, 2).flatten(0, 1)[places].transpose(0, 1)[None]


def to_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The tokens `rows` (sequences, longest) of x (1, heads, T, hs): (sequences, heads, longest, hs)."""
    return x[0].transpose(0, 1)[rows].transpose(1, 2)


def continued_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> Optional[torch.Tensor]:
    """Causal attention of the last T of S tokens, within the window, without a mask. None if no kernel does it. `q` is
    (1, n, T, hs), `k` and `v` are (1, g, S, hs)."""
    if not scores.fused or not has_varlen(q, v):
        return None
    ends = torch.arange(2, dtype=torch.int32, device=q.device)
    new, total = q.size(2), k.size(2)
    return varlen_attention(q, k, v, scores, ends * new, new, ends * total, total)


@operation
def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """Attention of T to S tokens where the mask, (T, S) or (B, 1, 1, S), is true, or everywhere."""
    if not scores.fused:
        return plain_attention(q, k, v, mask, scores)
    return fused_attention(q, k, v, scores.scale, mask)


def single_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, each: EachRow) -> torch.Tensor:
    """Attention of one token of each of B sequences to that sequence. `q` and the result are (B, n, 1, hs); `k` and `v`
    are the rows of the cache, (B, g, S, hs)."""
    size = k.size(2)
    if scores.fused and q.size(-1) == v.size(-1) and has_varlen(q, v) and "seqused_k" in parameters(varlen()):
        first = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B S, g, hs)
        lengths = first, first * size, 1, min(size, each.longest)
        used = {"enable_gqa": True, "seqused_k": each.lengths(size)}
        return varlen()(q[:, :, 0], keys, values, *lengths, scale=scores.scale, window_size=(-1, 0), **used)[:, :, None]
    size = min(size, each.longest)
    return one_query_attention(q, k[:, :, :size], v[:, :, :size], scores, each.mask(size))


def one_query_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Attention of one token to S tokens, (B, n, 1, hs): the heads that share keys become the queries of one head."""
    queries = q.reshape(len(q), k.size(1), -1, q.size(3))
    return masked_attention(queries, k, v, scores, mask).view(*q.shape[:-1], v.size(-1))


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: Optional[torch.Tensor] = None,
    causal: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` by a kernel that keeps no scores. Only flash attention takes groups of heads,
    and no mask. For the other kernel, k and v are repeated for the heads that share them."""
    if q.size(1) != k.size(1) and (mask is not None or not has_flash(v)):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, *lengths: Union[torch.Tensor, int]
) -> torch.Tensor:
    """Sequences end to end by one kernel. `q` is (1, n, T, hs), `k` and `v` are (1, g, S, hs). `lengths` are where the
    sequences begin and the last one ends, int32, and the longest; the same for the keys, if they are longer."""
    left = -1 if scores.window is None else scores.window - 1
    size, widest = v.size(-1), max(q.size(-1), v.size(-1))  # the kernel takes heads of one size
    q, k, v = (padded_heads(t[0].transpose(0, 1).to(v.dtype), widest) for t in (q, k, v))  # (T or S, n or g, hs)
    ends, longest, *of_keys = lengths
    key_ends, longest_keys = of_keys or (ends, longest)
    how = {"scale": scores.scale, "window_size": (left, 0), "enable_gqa": True}
    return varlen()(q, k, v, ends, key_ends, longest, longest_keys, **how)[..., :size].transpose(0, 1)[None]


def padded_heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """Heads (..., hs) of at least `size` dimensions, the new ones 0."""
    return F.pad(x, (0, size - x.size(-1))) if x.size(-1) < size else x


def has_varlen(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch has a kernel for packed sequences, forward and backward, for queries and values like these, (...,
    hs)."""
    size = max(q.size(-1), v.size(-1))
    if not v.is_cuda or not has_flash(v) or size % 8 or size > 256:
        return False
    if 192 < size <= 224 and torch.cuda.get_device_capability(v.device) in SMALL_BACKWARD:
        return False
    return {"scale", "window_size", "enable_gqa"} <= parameters(varlen())


def has_flash(x: torch.Tensor) -> bool:
    """Whether there is flash attention for tensors like this one."""
    old = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)
    return x.dtype in (torch.bfloat16, torch.float16) and not old


@cache
def parameters(kernel: Any) -> set[str]:
    return set(inspect.signature(kernel).parameters) if kernel is not None else set()


@cache
def varlen() -> Any:
    """`varlen_attn`, or None if this version of torch does not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
