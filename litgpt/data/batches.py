"""Batches without padding: rows end to end, each with its own attention.

Shapes: T is the number of tokens in all rows of a micro-batch.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from litgpt.model.devices import to_device
from litgpt.model.packing import Packing

UNTRAINED = -100  # the target of a token whose successor is not in the loss


@dataclass
class Batch:
    """One micro-batch.

    Args:
        ids: (1, T), int64
        targets: (1, T), int64: the next token in the same row, or `UNTRAINED`.
        seqlens: The length of each row.
        n_target_tokens: The number of targets that are not `UNTRAINED`.

    Two more attributes follow from these: `packing` has the positions of the tokens, and `trained` those tokens that
    have a target, (n_target_tokens,), int64.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    seqlens: list[int]
    n_target_tokens: int

    def __post_init__(self) -> None:
        self.packing = Packing.of(self.seqlens)
        self.trained = (self.targets[0] != UNTRAINED).nonzero().squeeze(1)

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device, by one transfer that the host does not wait for."""
        batch, packing = copy.copy(self), self.packing
        tensors = self.ids, self.targets, self.trained, packing.positions, packing.cu_seqlens
        batch.ids, batch.targets, batch.trained, *both = to_device(device, *tensors)
        batch.packing = Packing(self.seqlens, *both)
        return batch


class Rows(Protocol):
    """Rows, or packs of rows, by number. `lengths` are in tokens, int64."""

    lengths: torch.Tensor

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch: ...

    def longest(self, n: int) -> list[int]: ...


def steps_of_rows(n_rows: int, rows_per_step: int, epochs: int | None, seed: int, seen: int = 0) -> Iterator[list[int]]:
    """The row numbers of each optimizer step, after the first `seen` rows. Every epoch has all rows, in its own order.

    A step may start in one epoch and end in the next. Only the last step may be smaller. The order depends on the seed
    alone.
    """
    waiting: list[int] = []
    epoch = 0
    while epochs is None or epoch < epochs:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        waiting += torch.randperm(n_rows, generator=generator).tolist()
        waiting, seen = waiting[seen:], max(0, seen - len(waiting))
        while len(waiting) >= rows_per_step:
            yield waiting[:rows_per_step]
            waiting = waiting[rows_per_step:]
        epoch += 1
    if waiting:
        yield waiting


def micro_batches(rows: Sequence[int], size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This rank's share of a step, `size` rows at a time. All ranks get the same number; the last may be empty."""
    share = list(rows[rank::world_size])
    count = -(-len(rows) // (size * world_size))
    return [share[i * size : (i + 1) * size] for i in range(count)]


class PackedRows:
    """Packs of rows, with the interface of rows. Rows of a pack keep their own attention.

    Args:
        rows: The rows.
        capacity: Maximum number of tokens in a pack.
    """

    def __init__(self, rows: Rows, capacity: int) -> None:
        self.rows = rows
        self.packs = best_fit(rows.lengths.tolist(), capacity)
        self.lengths = torch.tensor([int(rows.lengths[pack].sum()) for pack in self.packs], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.packs)

    def batch(self, packs: Sequence[int]) -> Batch:
        return self.rows.batch([row for pack in packs for row in self.packs[pack]])

    def longest(self, n: int) -> list[int]:
        return self.lengths.argsort(descending=True, stable=True)[:n].tolist()


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: the longest rows first, each into the fullest pack that has room.

    Returns:
        The row numbers of each pack. A row of more than `capacity` tokens has its own pack.
    """
    room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # packs by their number of free tokens
    some = 0  # a bit for each number of free tokens that a pack has
    packs = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = min(lengths[row], capacity)
        enough = some >> length
        if enough:
            free = length + (enough & -enough).bit_length() - 1
            pack = room[free].pop()
            some ^= 0 if room[free] else 1 << free
        else:
            free, pack = capacity, []
            packs.append(pack)
        pack.append(row)
        room[free - length].append(pack)
        some |= 1 << (free - length)
    return packs
