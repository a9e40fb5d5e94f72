"""Batches without padding: rows laid end to end, each a document of its own.

Shapes: T tokens of all rows of a micro-batch.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

UNTRAINED = -100  # the target of a token whose successor is not trained


@dataclass
class Batch:
    """One micro-batch.

    Args:
        ids: (1, T), int64
        targets: (1, T), int64: the token that follows in the same row, or `UNTRAINED`.
        documents: The length of each row.
        n_trained: Targets that are trained.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    documents: list[int]
    n_trained: int

    def to(self, device: torch.device) -> "Batch":
        ids, targets = (t.to(device, non_blocking=True) for t in (self.ids, self.targets))
        return Batch(ids, targets, self.documents, self.n_trained)


class TokenizedRows:
    """The token ids of many rows, end to end in flat tensors.

    Args:
        ids: int32, all tokens.
        trained: bool, which of them are trained.
        starts: int64, where each row begins, and the end of the last.
        n_cut: Rows that were cut to the allowed length.
        n_left_out: Rows that were left out because no token of them is trained.
    """

    def __init__(
        self, ids: torch.Tensor, trained: torch.Tensor, starts: torch.Tensor, n_cut: int, n_left_out: int
    ) -> None:
        self.ids, self.trained, self.starts = ids, trained, starts
        self.n_cut, self.n_left_out = n_cut, n_left_out
        self.lengths = starts.diff()

    @dataclass
    class Builder:
        """Takes rows one by one."""

        ids: array = field(default_factory=lambda: array("i"))
        trained: array = field(default_factory=lambda: array("b"))
        starts: array = field(default_factory=lambda: array("q", [0]))
        n_cut: int = 0
        n_left_out: int = 0

        def add(self, ids: Sequence[int], trained: Sequence[bool], max_length: int) -> None:
            cut = len(ids) > max_length
            ids, trained = ids[:max_length], trained[:max_length]
            if not any(trained[1:]):  # the first token follows nothing, so it is never a target
                self.n_left_out += 1
                return
            self.n_cut += cut
            self.ids.extend(ids)
            self.trained.extend(trained)
            self.starts.append(len(self.ids))

        def build(self) -> "TokenizedRows":
            return TokenizedRows(
                torch.tensor(self.ids, dtype=torch.int32),
                torch.tensor(self.trained, dtype=torch.bool),
                torch.tensor(self.starts, dtype=torch.int64),
                self.n_cut,
                self.n_left_out,
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and trained marks of row `i`."""
        where = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return self.ids[where], self.trained[where]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers, end to end; for none at all a row of which nothing is trained, so that a rank
        without a share can still take part."""
        ids, targets = [], []
        for i in rows or [0]:
            row, trained = self.row(i)
            row = row.long()
            target = torch.full_like(row, UNTRAINED)
            if rows:
                target[:-1] = torch.where(trained[1:], row[1:], UNTRAINED)
            ids.append(row)
            targets.append(target)
        flat = torch.cat(targets)
        return Batch(torch.cat(ids)[None], flat[None], [len(i) for i in ids], int((flat != UNTRAINED).sum()))

    def longest(self, n: int) -> list[int]:
        """The numbers of the `n` longest rows."""
        return self.lengths.argsort(descending=True, stable=True)[:n].tolist()


def steps_of_rows(n_rows: int, rows_per_step: int, epochs: int | None, seed: int) -> Iterator[list[int]]:
    """The row numbers of each optimizer step: every epoch in an order of its own, no row left out.

    A step may begin in one epoch and end in the next; only the last one may be smaller. The order depends on the seed
    and nothing else.
    """
    waiting: list[int] = []
    epoch = 0
    while epochs is None or epoch < epochs:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        waiting += torch.randperm(n_rows, generator=generator).tolist()
        while len(waiting) >= rows_per_step:
            yield waiting[:rows_per_step]
            waiting = waiting[rows_per_step:]
        epoch += 1
    if waiting:
        yield waiting


def micro_batches(rows: Sequence[int], size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This rank's share of a step, `size` rows at a time. Every rank gets as many, the last of them may be empty."""
    mine = list(rows[rank::world_size])
    count = -(-len(rows) // (size * world_size))
    return [mine[i * size : (i + 1) * size] for i in range(count)]
