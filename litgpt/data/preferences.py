"""Batches of preference data: pairs of a chosen and a rejected answer, or single answers with a label.

Shapes: S sequences, n target tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from litgpt.data.batches import UNTRAINED, Batch
from litgpt.data.tokens import ANSWER, IN_LOSS, REJECTED, TokenizedRows
from litgpt.model.devices import to_device


@dataclass
class PreferenceBatch(Batch):
    """A micro-batch. The two sequences of a pair follow each other, the chosen one first.

    Args:
        sequence: The sequence of each target token, (n,), int64.
        place: The place of each target token among those of all sequences, each filled up to `width`, (n,), int64.
        answer: 1 for target tokens that belong to an answer, 0 for those of prompts, (n,), float32.
        rejected: 1 for sequences with a rejected or undesirable answer, 0 for others, (S,), float32.
        reference: The log-probability of each answer under the reference model, (S,), float32.
        n_answer_tokens: The number of target tokens of each answer, (S,), float32.
        width: The most target tokens of a sequence.
        n_rejected: The number of rejected sequences.
        n_chosen_tokens: The target tokens of the others.
    """

    sequence: torch.Tensor
    place: torch.Tensor
    answer: torch.Tensor
    rejected: torch.Tensor
    reference: torch.Tensor
    n_answer_tokens: torch.Tensor
    width: int
    n_rejected: int
    n_chosen_tokens: int

    def to(self, device: torch.device) -> "PreferenceBatch":
        batch = cast(PreferenceBatch, super().to(device))
        names = ("sequence", "place", "answer", "rejected", "reference", "n_answer_tokens")
        moved = to_device(device, *(getattr(self, name) for name in names))
        batch.__dict__ |= dict(zip(names, moved))
        return batch

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sums of values of target tokens, (n,), over each sequence, (S,). They do not vary, also on a GPU."""
        filled = values.new_zeros(len(self.seqlens) * self.width).index_copy(0, self.place, values)
        return filled.view(-1, self.width).sum(1)


class PreferenceRows:
    """Rows of preference data, with the interface of rows.

    Args:
        rows: Their tokens. Those of a pair are the two sequences, one after the other.

    Attributes:
        reference: Log-probabilities under the reference model, (rows, 2), float32: of the chosen or only answer, and of
            the rejected one. NaN until they are known.
    """

    def __init__(self, rows: TokenizedRows) -> None:
        self.rows, self.lengths = rows, rows.lengths
        self.reference = torch.full((len(rows), 2), torch.nan)

    def __len__(self) -> int:
        return len(self.rows)

    def longest(self, n: int) -> list[int]:
        return self.rows.longest(n)

    def row(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows.row(i)

    def batch(self, rows: Sequence[int]) -> PreferenceBatch:
        """These rows. Without rows: one row without targets, for a rank that has no share of a step."""
        sequences, references = [], []
        for i in rows or [0]:
            found = self.rows.sequences(i)
            sequences += found
            references.append(self.reference[i][: len(found)])
        return make_batch(sequences, torch.cat(references), is_empty=not rows)

    def mismatched(self, pairs: Sequence[tuple[int, int]], limit: int) -> PreferenceBatch:
        """For each pair of rows, the prompt of the first with the answer of the second, of at most `limit` tokens."""
        sequences = []
        for i, j in pairs or [(0, 0)]:
            prompt, answer = self.rows.prompt(i), self.rows.answer(j)
            ids = torch.tensor([*prompt, *answer][:limit], dtype=torch.int32)
            mask = torch.full((len(ids),), IN_LOSS | ANSWER, dtype=torch.uint8)
            mask[: len(prompt)] = 0
            sequences.append((ids, mask))
        return make_batch(sequences, torch.zeros(len(sequences)), is_empty=not pairs)


def make_batch(
    sequences: Sequence[tuple[torch.Tensor, torch.Tensor]], reference: torch.Tensor, is_empty: bool
) -> PreferenceBatch:
    """A batch of sequences, each with its ids and loss mask. `is_empty` removes all targets."""
    ids = torch.cat([ids for ids, _ in sequences]).long()
    seqlens = [len(ids) for ids, _ in sequences]
    following = torch.cat([torch.cat([mask[1:], mask.new_zeros(1)]) for _, mask in sequences])
    is_target = (following & IN_LOSS).bool() if not is_empty else torch.zeros(len(ids), dtype=torch.bool)
    targets = torch.where(is_target, ids.roll(-1), UNTRAINED)
    of = torch.repeat_interleave(torch.arange(len(seqlens)), torch.tensor(seqlens))[is_target]
    rejected = torch.tensor([float(bool(mask[-1] & REJECTED)) for _, mask in sequences])
    answer = (following[is_target] & ANSWER).bool().float()
    counts = of.bincount(minlength=len(seqlens))
    width = max(1, int(counts.max()))
    place = of * width + torch.arange(len(of)) - (counts.cumsum(0) - counts)[of]
    return PreferenceBatch(
        ids=ids[None],
        targets=targets[None],
        seqlens=seqlens,
        n_target_tokens=len(of),
        sequence=of,
        place=place,
        answer=answer,
        rejected=rejected,
        reference=reference,
        n_answer_tokens=torch.zeros(len(seqlens)).index_add(0, of, answer),
        width=width,
        n_rejected=0 if is_empty else int(rejected.sum()),
        n_chosen_tokens=int((rejected[of] == 0).sum()),
    )
