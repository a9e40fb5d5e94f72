"""The gated delta rule (https://arxiv.org/abs/2412.06464): for one token, and for many.

For each token the state S (K, V) decays, what it holds under the key k is moved towards the value v, and the query q
reads it: S = exp(g) S; S = S + beta k (v - k S); y = q S.

Shapes: B rows, T tokens, H heads of values, K size of a key, V size of a value, C tokens of a chunk.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Optional

import torch
from torch.utils.checkpoint import checkpoint

from litgpt.model.chunks import Decays, in_chunks
from litgpt.model.kernels import operation
from litgpt.model.packing import Packing

EPS = 1e-6  # of the length of queries and keys
Outputs = tuple[torch.Tensor, torch.Tensor]


def prepared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys of length 1, for every head of values, and values, (B, H, T, size), at least in float32."""
    dtype, each = torch.promote_types(v.dtype, torch.float32), v.size(2) // k.size(2)
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + EPS) for t in (q, k))
    return (q * q.size(-1) ** -0.5).repeat_interleave(each, dim=1), k.repeat_interleave(each, dim=1), v


def one_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> Outputs:
    """The outputs (B, 1, H, V) of one token of each of B sequences, and the new states (B, H, K, V). Arguments as in
    `delta_rule`."""
    q, k, v = prepared(q, k, v)
    state = state * decay.transpose(1, 2)[..., None].exp()
    change = (v - k @ state) * beta.transpose(1, 2)[..., None]
    state = state + k.transpose(2, 3) * change
    return (q @ state).transpose(1, 2), state


@operation
def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    packing: Optional[Packing] = None,
    states: Optional[torch.Tensor] = None,
) -> Outputs:
    """By the kernel of flash-linear-attention if it is installed, which takes 16 bits. Else the backward pass computes
    all again, because the intermediate results are several times as large as the inputs.

    Args:
        q: Queries, (B, T, K heads, K). They and the keys get a length of 1.
        k: Keys, as the queries.
        v: Values, (B, T, H, V).
        decay: Logarithms, at most 0, (B, T, H).
        beta: How much a token changes the state, from 0 to 1, (B, T, H).
        packing: The sequences that lie end to end, each of which begins without a state; by default a row is one.
        states: Before the first token, (B, H, K, V).

    Returns:
        The outputs, (B, T, H, V), and the state after the last token.
    """
    kernel = fla_kernel() if v.is_cuda and v.dtype in (torch.float16, torch.bfloat16) else None
    if kernel is not None:
        ends = packing.cu_seqlens.long() if packing is not None and len(v) == 1 else None
        options = {"initial_state": states, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return kernel(q, k, v, g=decay, beta=beta, cu_seqlens=ends, **options)
    return checkpoint(chunked_delta_rule, q, k, v, decay, beta, packing, states, use_reentrant=False)


@cache
def fla_kernel() -> Optional[Callable[..., Outputs]]:
    """That of https://github.com/fla-org/flash-linear-attention; None if it is not installed."""
    with suppress(ImportError):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule
    return None


def chunked_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    packing: Optional[Packing] = None,
    states: Optional[torch.Tensor] = None,
) -> Outputs:
    """As `delta_rule`, a chunk of tokens at a time. Within a chunk the changes of the state, each of which depends on
    those before it, are the solution of a triangular system."""
    total = v.size(1)
    q, k, v = (in_chunks(t, 2) for t in prepared(q, k, v))  # (B, H, n, C, size)
    decay, beta = (t.transpose(1, 2).to(v.dtype) for t in (decay, beta))
    between, since_start, until_end, through = Decays.of(decay, packing)
    beta = in_chunks(beta, 2)[..., None]
    updates = torch.cat([v, k * since_start], dim=-1) * beta
    system = (k * beta) @ k.transpose(-1, -2) * between
    solved = torch.linalg.solve_triangular(system, updates, upper=False, unitriangular=True)
    values, reading = solved.split_with_sizes([v.size(-1), k.size(-1)], dim=-1)
    seen = q @ k.transpose(-1, -2) * between
    q, k = q * since_start, (k * until_end).transpose(-1, -2)
    state = v.new_zeros(v.size(0), v.size(1), q.size(-1), v.size(-1)) if states is None else states.to(v.dtype)
    outputs = []
    for q_, k_, values_, reading_, seen_, through_ in zip(
        *(t.unbind(2) for t in (q, k, values, reading, seen, through))
    ):
        changes = values_ - reading_ @ state
        outputs.append(q_ @ state + seen_ @ changes)
        state = state * through_ + k_ @ changes
    return torch.stack(outputs, 2).flatten(2, 3)[:, :, :total].transpose(1, 2), state
