"""The state space of Mamba 2 (https://arxiv.org/abs/2405.21060): for one token, and for many.

For each token the state S (K, V) decays and gets the value v under the key k, and the query q reads it:
S = exp(g) S + k v; y = q S.

Shapes: B rows, T tokens, G groups of heads with the same keys and queries, E heads of a group, H heads, K size of a
key, V size of a value, C tokens of a chunk, n chunks.
"""

from typing import Optional

import torch
from torch.utils.checkpoint import checkpoint

from litgpt.model.chunks import Decays, in_chunks
from litgpt.model.kernels import operation
from litgpt.model.packing import Packing

Outputs = tuple[torch.Tensor, torch.Tensor]


def one_token(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> Outputs:
    """The outputs (B, 1, H, V) of one token of each of B sequences, and the new states (B, G, K, E, V). Arguments as in
    `state_space`."""
    q, k = q.transpose(1, 2), k.permute(0, 2, 3, 1)  # (B, G, 1, K), (B, G, K, 1)
    v, decay = v.unflatten(2, (k.size(1), -1)), decay.unflatten(2, (k.size(1), -1))
    added = k[..., None] * v.transpose(1, 2)
    state = state * decay.exp().transpose(1, 2)[..., None] + added
    return (q @ state.flatten(3)).view(len(q), 1, -1, v.size(-1)), state


@operation
def state_space(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    packing: Optional[Packing] = None,
    states: Optional[torch.Tensor] = None,
) -> Outputs:
    """The backward pass computes all again, because the intermediate results are several times as large as the inputs.

    Args:
        q: Queries, (B, T, G, K).
        k: Keys, as the queries.
        v: Values times the step, (B, T, H, V).
        decay: Logarithms, at most 0, (B, T, H).
        packing: The sequences that lie end to end, each of which begins without a state; by default a row is one.
        states: Before the first token, (B, G, K, E, V).

    Returns:
        The outputs, (B, T, H, V), and the state after the last token.
    """
    return checkpoint(chunked_state_space, q, k, v, decay, packing, states, use_reentrant=False)


def chunked_state_space(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    packing: Optional[Packing] = None,
    states: Optional[torch.Tensor] = None,
) -> Outputs:
    """As `state_space`, a chunk of tokens at a time, which attend to each other and read the state before them."""
    total, groups = v.size(1), k.size(2)
    decays = Decays.of(decay.transpose(1, 2), packing)
    between, *others = (t.unflatten(1, (groups, -1)) for t in decays)
    since_start, until_end, through = (t.movedim(2, -2) for t in others)  # (B, G, n, C or 1, E, 1)
    q, k = (in_chunks(t.transpose(1, 2), 2) for t in (q, k))  # (B, G, n, C, K)
    v = in_chunks(v.unflatten(2, (groups, -1)).transpose(1, 2), 2)  # (B, G, n, C, E, V)

    added = k.transpose(-1, -2) @ (v * until_end).flatten(4)
    state = torch.zeros_like(added[:, :, 0]).unflatten(3, v.shape[4:]) if states is None else states.to(v.dtype)
    reached = []  # the states that reach each chunk
    for added_, through_ in zip(added.unflatten(4, v.shape[4:]).unbind(2), through.unbind(2)):
        reached.append(state)
        state = state * through_ + added_
    y = (q @ torch.stack(reached, 2).flatten(4)).unflatten(4, v.shape[4:]) * since_start
    seen = (q @ k.transpose(-1, -2))[:, :, None] * between
    y = y + (seen @ v.movedim(-2, 2)).movedim(2, -2)
    return y.flatten(2, 3)[:, :, :total].transpose(1, 2).flatten(2, 3), state
