"""`torch.nn.attention.varlen.varlen_attn` by a plain computation, for CPUs, which have no such kernel."""

from itertools import pairwise

import torch
from torch.nn import functional as F


def varlen_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Causal attention of packed sequences: `q` is (T, n, hs); `k` and `v` are (T, g, hs)."""
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_k and enable_gqa
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q == max_seqlen_k and int(cu_seqlens_q[-1]) == len(q)
    left, right = window_size
    assert right == 0
    outputs = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        a, b, c = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
        mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        mask = mask if left < 0 else mask.triu(-left)
        outputs.append(F.scaled_dot_product_attention(a, b, c, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)
