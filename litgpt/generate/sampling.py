"""Choosing the next token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from litgpt.errors import UserError
from litgpt.model.devices import pinned, to_device


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Papers: top_p (https://arxiv.org/abs/1904.09751), min_p (https://arxiv.org/abs/2407.01082), repetition_penalty
    (https://arxiv.org/abs/1909.05858).

    Args:
        temperature: Sampling temperature. Below 1, likely tokens become likelier; 0 is greedy.
        top_k: Sample only from this many of the most likely tokens; null for all.
        top_p: Sample only from the most likely tokens whose probabilities add up to this.
        min_p: Sample only from tokens at least this likely, as a fraction of the most likely token's probability.
        repetition_penalty: Penalty on tokens that the text already has. Above 1 they become less likely; 1 is off.

    Raises:
        UserError: values are out of range; all of them at once.
    """

    temperature: float = 0.8
    top_k: Optional[int] = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        inf = float("inf")
        checks = (
            ("temperature", 0 <= self.temperature < inf, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "above 0"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < inf, "above 0"),
        )
        wrong = [f"--{name} {getattr(self, name)} must be {allowed}" for name, valid, allowed in checks if not valid]
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
        cumulative = p.cumsum(dim=-1)
        drawn = pinned(torch.tensor([[g.random()] for g in numbers])).to(p.device, non_blocking=True)
        drawn = drawn * cumulative[:, -1:]
        last = (p > 0).int().cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # where rounding leads past the end
        index = torch.searchsorted(cumulative, drawn, right=True).minimum(last)
        return (index if ids is None else ids.gather(-1, index)).squeeze(-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """How likely `draw` takes each token, (B, V), float32, for logits (B, V)."""
        zeros = torch.zeros(logits.shape, device=logits.device)
        if self.greedy:
            return zeros.scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        p, ids = self.limited(logits)
        p = p / p.sum(dim=-1, keepdim=True)
        return p if ids is None else zeros.scatter(-1, ids, p)

    def limited(self, logits: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The probabilities that remain after all limits, (B, n), not scaled to add up to 1; and the ids that they
        belong to, or None if they are those of all tokens in order."""
        values, ids, k = logits, None, self.top_k or logits.size(-1)
        if k < logits.size(-1) or self.top_p < 1 or self.min_p > 0:
            # select by place, not by value: in bfloat16 many logits are equal
            values, ids = logits.topk(min(k, logits.size(-1)))
        p = (values.float() / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            before = p.cumsum(dim=-1) - p  # the most likely token always stays
            p = p.masked_fill(before >= self.top_p, 0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p[:, :1], 0)
        return p, ids

    def penalize(self, logits: torch.Tensor, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (B, V) with the penalty on the tokens that each row's text has."""
        if self.repetition_penalty == 1:
            return logits
        pairs = torch.tensor([(row, token) for row, ids in enumerate(texts) for token in sorted(set(ids))])
        rows, tokens = to_device(logits.device, pairs)[0].unbind(1)
        values = logits[rows, tokens]
        values = torch.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
        return logits.index_put((rows, tokens), values)
