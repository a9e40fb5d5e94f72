"""Choosing the next token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from litgpt.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Args:
        temperature: The logits are divided by it; 0 takes the most likely token.
        top_k: Only so many of the most likely tokens are drawn from; null for all.
        top_p: Only the most likely tokens whose probabilities sum up to this (https://arxiv.org/abs/1904.09751).
        min_p: Only tokens that are at least this likely, as a share of the most likely one
            (https://arxiv.org/abs/2407.01082).
        repetition_penalty: Logits of tokens that the text has already are divided by it where they are above 0, and
            multiplied where they are below (https://arxiv.org/abs/1909.05858); 1 changes nothing.

    Raises:
        UserError: a number is out of range; all that is wrong at once.
    """

    temperature: float = 0.8
    top_k: Optional[int] = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.temperature < float("inf"):
            wrong.append(f"--temperature {self.temperature} is not a number from 0 on")
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f"--top_k {self.top_k} must be above 0")
        if not 0 <= self.top_p <= 1:
            wrong.append(f"--top_p {self.top_p} is not between 0 and 1")
        if not 0 <= self.min_p <= 1:
            wrong.append(f"--min_p {self.min_p} is not between 0 and 1")
        if not 0 < self.repetition_penalty < float("inf"):
            wrong.append(f"--repetition_penalty {self.repetition_penalty} must be above 0")
        if wrong:
            raise UserError("; ".join(wrong) + ".")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    def draw(self, logits: torch.Tensor, numbers: Sequence[random.Random]) -> torch.Tensor:
        """Token ids (B,) for logits (B, V), each row with a number from its own generator."""
        if self.greedy:
            return logits.max(dim=-1).indices  # as `argmax`, which takes five times as long in bfloat16 on a CPU
        p, ids = self.limited(logits)
        sums = p.cumsum(dim=-1)
        drawn = torch.tensor([[g.random()] for g in numbers], device=sums.device) * sums[:, -1:]
        last = (p > 0).int().cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # where rounding leads past the end
        place = torch.searchsorted(sums, drawn, right=True).minimum(last)
        return (place if ids is None else ids.gather(-1, place)).squeeze(-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """How likely `draw` takes each token, (B, V), float32, for logits (B, V)."""
        zeros = torch.zeros(logits.shape, device=logits.device)
        if self.greedy:
            return zeros.scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        p, ids = self.limited(logits)
        p = p / p.sum(dim=-1, keepdim=True)
        return p if ids is None else zeros.scatter(-1, ids, p)

    def limited(self, logits: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """What remains of the probabilities, (B, n), not scaled to sum up to 1; and the ids that they belong to, if
        they are not those of all tokens in order."""
        values, ids, k = logits, None, self.top_k or logits.size(-1)
        if k < logits.size(-1) or self.top_p < 1 or self.min_p > 0:
            # the likeliest first; by place, not by value: in bfloat16 many logits are equal
            values, ids = logits.topk(min(k, logits.size(-1)))
        p = (values.float() / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            before = p.cumsum(dim=-1) - p  # the likeliest token always stays
            p = p.masked_fill(before >= self.top_p, 0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p[:, :1], 0)
        return p, ids

    def penalize(self, logits: torch.Tensor, seen: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (B, V) with the penalty on the tokens that each row has seen."""
        if self.repetition_penalty == 1:
            return logits
        logits = logits.clone()
        for row, ids in zip(logits, seen):
            at = torch.tensor(sorted(set(ids)), device=row.device)
            values = row[at]
            row[at] = torch.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
        return logits
