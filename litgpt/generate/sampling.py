"""Choosing the next token."""

from dataclasses import dataclass
from typing import Optional

import torch

from litgpt.errors import UserError


@dataclass
class Sampling:
    """How the next token is drawn from the logits.

    Args:
        temperature: The logits are divided by it; 0 takes the most likely token.
        top_k: Only so many of the most likely tokens are drawn from; null for all.
        top_p: Only the most likely tokens whose probabilities sum up to this (https://arxiv.org/abs/1904.09751).

    Raises:
        UserError: a number is out of range.
    """

    temperature: float = 0.8
    top_k: Optional[int] = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature} is below 0.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k {self.top_k} must be above 0.")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} is not between 0 and 1.")

    def draw(self, logits: torch.Tensor, generator: Optional[torch.Generator] = None) -> torch.Tensor:
        """Token ids (B,) for logits (B, V)."""
        if self.temperature == 0 or self.top_p == 0 or self.top_k == 1:
            return logits.argmax(dim=-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.size(-1):
            values, order = logits.topk(self.top_k)  # by place, not by value: in bfloat16 many logits are equal
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, order, values)
        if self.top_p < 1:
            values, order = logits.sort(descending=True)
            probabilities = values.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities  # the most likely token always stays
            values = values.masked_fill(before >= self.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(-1, order, values)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)
