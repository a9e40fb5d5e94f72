"""Attention: which kernel computes it. Each operation is what a GPU runs; `kernels_cpu` has the versions for a CPU.

Shapes: B rows, T tokens, S tokens that they may attend to, n query heads, g key-value heads, hs head size.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Optional

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from litgpt.model.chunked_attention import CausalAttention, Scores, chunk_size, softcapped_attention
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
    if scores.softcap is None and (scores.window is None or total <= scores.window):
        return fused_attention(q, k, v, scores.scale, causal=True)
    if scores.softcap is None and len(q) == 1 and has_varlen(v):
        ends = torch.arange(2, dtype=torch.int32, device=q.device) * total
        return varlen_attention(q, k, v, scores, ends, total)
    return CausalAttention.apply(q.to(v.dtype), k.to(v.dtype), v, scores, chunk_size(q, SCORES))


@operation
def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, packing: Packing
) -> torch.Tensor:
    """Causal attention of each of several sequences to itself. Shapes as in `causal_attention`, B is 1. One kernel for
    all of them; where there is none, they become the rows of a padded batch."""
    if len(packing.seqlens) == 1:
        return causal_attention(q, k, v, scores)
    if scores.softcap is None and has_varlen(v):
        return varlen_attention(q, k, v, scores, packing.cu_seqlens, packing.longest)
    rows, places = packing.padded
    q, k, v = (remat(x, to_rows, rows) for x in (q, k, v))
    y = causal_attention(q, k, v, scores)  # (sequences, n, longest, hs)
    return y.transpose(1, 2).flatten(0, 1)[places].transpose(0, 1)[None]


def to_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The tokens `rows` (sequences, longest) of x (1, heads, T, hs): (sequences, heads, longest, hs)."""
    return x[0].transpose(0, 1)[rows].transpose(1, 2)


@operation
def continued_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, mask: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Causal attention of the last T of S tokens. `q` is (B, n, T, hs), `k` and `v` are (B, g, S, hs); `mask` makes the
    mask (T, S), true where a token is visible."""
    if scores.softcap is None and q.dtype != torch.float32:
        return F.scaled_dot_product_attention(
            q, k, v, causal_lower_right(q.size(2), k.size(2)), scale=scores.scale, enable_gqa=True
        )
    return masked_attention(q, k, v, scores, mask())


@operation
def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """Attention of T to S tokens where the mask, (T, S) or (B, 1, 1, S), is true, or everywhere."""
    if scores.softcap is not None:
        return softcapped_attention(q, k, v, mask, scores.scale, scores.softcap)
    return fused_attention(q, k, v, scores.scale, mask)


def single_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, each: EachRow) -> torch.Tensor:
    """Attention of one token of each of B sequences to that sequence. `q` and the result are (B, n, 1, hs); `k` and `v`
    are the rows of the cache, (B, g, S, hs)."""
    size = k.size(2)
    if scores.softcap is None and has_varlen(v) and "seqused_k" in parameters(varlen()):
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
    return masked_attention(queries, k, v, scores, mask).view(q.shape)


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: Optional[torch.Tensor] = None,
    causal: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` by a kernel that keeps no scores. Only flash attention takes groups of heads,
    in 16 bits and without a mask. For the others, k and v are repeated for the heads that share them."""
    if q.size(1) != k.size(1) and (mask is not None or q.dtype == torch.float32):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, cu_seqlens: torch.Tensor, longest: int
) -> torch.Tensor:
    """Sequences end to end by one kernel. Shapes as in `packed_attention`."""
    left = -1 if scores.window is None else scores.window - 1
    q, k, v = (t[0].transpose(0, 1).to(v.dtype) for t in (q, k, v))  # (T, n or g, hs)
    lengths = cu_seqlens, cu_seqlens, longest, longest
    y = varlen()(q, k, v, *lengths, scale=scores.scale, window_size=(left, 0), enable_gqa=True)
    return y.transpose(0, 1)[None]


def has_varlen(x: torch.Tensor) -> bool:
    """Whether torch has a kernel for packed sequences, forward and backward, for tensors like this one, (..., hs)."""
    size = x.size(-1)
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or size % 8 or size > 256:
        return False
    capability = torch.cuda.get_device_capability(x.device)
    if capability in SMALL_BACKWARD and 192 < size <= 224:
        return False
    return capability >= (8, 0) and {"scale", "window_size", "enable_gqa"} <= parameters(varlen())


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
