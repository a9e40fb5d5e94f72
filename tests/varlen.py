"""`torch.nn.attention.varlen.varlen_attn` by a plain computation, for CPUs, which have no such kernel."""

from itertools import pairwise
from typing import Optional

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
    seqused_k: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Causal attention of packed sequences: `q` is (T, n, hs); `k` and `v` are (S, g, hs). The last queries and keys of
    a sequence are aligned. Of its keys it uses the first `seqused_k`, without a gradient."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and enable_gqa and window_size[1] == 0
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_q[-1]) == len(q)
    used = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    assert used.dtype == torch.int32 and int(used.max()) <= max_seqlen_k and bool((used <= cu_seqlens_k.diff()).all())
    assert seqused_k is None or not torch.is_grad_enabled()
    outputs = []
    for (start, end), first, n_keys in zip(pairwise(cu_seqlens_q.tolist()), cu_seqlens_k.tolist(), used.tolist()):
        a, b, c = (
            t.transpose(0, 1)[None] for t in (q[start:end], k[first : first + n_keys], v[first : first + n_keys])
        )
        n = end - start
        mask = torch.ones(n, n_keys, dtype=torch.bool).tril(n_keys - n)
        if window_size[0] >= 0:
            mask = mask.triu(n_keys - n - window_size[0])
        outputs.append(F.scaled_dot_product_attention(a, b, c, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)
