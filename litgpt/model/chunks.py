"""The chunks of tokens in which recurrent layers read a text.

Shapes: B rows, T tokens, H heads, C tokens of a chunk, n chunks.
"""

from typing import NamedTuple, Optional

import torch
from torch.nn import functional as F

from litgpt.model.packing import Packing

CHUNK = 64


def in_chunks(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Splits a dimension of tokens, (..., T, ...), which is filled up with zeros, into (..., n, C, ...)."""
    padding = -x.size(dim) % CHUNK
    x = F.pad(x, (*(0, 0) * (x.dim() - 1 - dim), 0, padding)) if padding else x
    return x.unflatten(dim, (x.size(dim) // CHUNK, CHUNK))


class Decays(NamedTuple):
    """By how much a state decays within each chunk; 0 between tokens of different sequences."""

    between: torch.Tensor  # an earlier token and a later one, (B, H, n, C, C)
    since_start: torch.Tensor  # the state before the chunk and a token, (B, H, n, C, 1)
    until_end: torch.Tensor  # a token and the state after the chunk, (B, H, n, C, 1)
    through: torch.Tensor  # the states before and after the chunk, (B, H, n, 1, 1)

    @classmethod
    def of(cls, decay: torch.Tensor, packing: Optional[Packing]) -> "Decays":
        """From the logarithms (B, H, T) of how much each token makes the state decay."""
        total, device = decay.size(2), decay.device
        mine = torch.zeros(total, dtype=torch.int64, device=device) if packing is None else packing.sequence
        mine = in_chunks(F.pad(mine[None], (0, -total % CHUNK), mode="replicate")[0] if total else mine, 0)
        before = torch.cat([mine[:1, :1], mine[:-1, -1:]])  # the sequence whose state reaches a chunk
        last = mine[:, -1:]

        def decayed(logs: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            return logs.masked_fill(~seen, -torch.inf).exp()

        logs = in_chunks(decay, 2)
        sums = logs.cumsum(-1)
        between = logs[..., None].expand(*logs.shape, CHUNK).tril(-1).cumsum(-2)  # a difference of sums loses digits
        return cls(
            decayed(between, (mine[:, :, None] == mine[:, None, :]).tril()),
            decayed(sums, mine == before)[..., None],
            decayed(between[..., -1, :], mine == last)[..., None],
            decayed(sums[..., -1:], before == last)[..., None],
        )
