"""Sequences laid end to end: where each begins, and the position of every token.

Shapes: T is the number of tokens in all sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Optional

import torch

from litgpt.model.devices import to_device


@dataclass
class Packing:
    """Sequences that lie end to end.

    Args:
        seqlens: Their lengths.
        positions: The position of each token in its sequence, (T,), int64.
        cu_seqlens: Where sequences begin, and where the last one ends, (sequences + 1,), int32.
    """

    seqlens: list[int]
    positions: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, seqlens: list[int], starts: Optional[Sequence[int]] = None) -> "Packing":
        """On the CPU. `starts` are the positions of the first tokens, 0 by default."""
        positions = [torch.arange(start, start + n) for start, n in zip(starts or [0] * len(seqlens), seqlens)]
        return cls(seqlens, torch.cat(positions), torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32))

    def to(self, device: torch.device) -> "Packing":
        return Packing(self.seqlens, *to_device(device, self.positions, self.cu_seqlens))

    @property
    def longest(self) -> int:
        return max(self.seqlens)

    @cached_property
    def sequence(self) -> torch.Tensor:
        """The index of the sequence of each token, (T,)."""
        tokens = torch.arange(sum(self.seqlens), device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:].long(), tokens, right=True)

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The token at each place of a batch with a row per sequence, (sequences, longest), and the place of each
        token, (T,). After the end of a sequence stand tokens of the next ones."""
        first, device = self.cu_seqlens[:-1].long(), self.cu_seqlens.device
        rows = first[:, None] + torch.arange(self.longest, device=device)
        places = self.sequence * self.longest + torch.arange(len(self.sequence), device=device) - first[self.sequence]
        return rows.clamp_(max=len(places) - 1), places
