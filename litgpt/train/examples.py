"""The model's answers to validation prompts, before and after training."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import torch

from litgpt.generate.engine import generate
from litgpt.generate.sampling import Sampling
from litgpt.train.faults import spared

if TYPE_CHECKING:
    from litgpt.train.run import Run


class FirstRankGreedy(Sampling):
    """Greedy decoding on the first rank for all ranks, so that rounding cannot make one of them stop earlier."""

    def draw(self, logits: torch.Tensor, numbers: Sequence[random.Random]) -> torch.Tensor:
        token = logits.argmax(dim=-1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(token, 0)
        return token


class Examples:
    """Shows greedy answers to validation prompts. All ranks have to call its methods."""

    def __init__(self, run: "Run") -> None:
        self.model, self.tokenizer, self.dataset = run.loss_model, run.tokenizer, run.dataset
        self.eval, self.scores, self.screen = run.eval, run.result.scores, run.screen
        self.ranks = run.fabric.world_size

    def show(self, when: str) -> None:
        """Print some answers and, if requested, the fraction of exact answers. `when` is before or after."""
        if self.eval.max_new_tokens and len(self.dataset.val):
            with spared(f"Cannot show the examples ({when})", self.ranks):
                self.show_answers(when)
            with spared(f"Cannot count the exact answers ({when})", self.ranks):
                self.count_exact(when)

    def show_answers(self, when: str) -> None:
        rows, choice = self.dataset.val, self.eval.evaluate_example
        if choice is None:
            return
        first = {"first": 0, "random": random.Random(0).randrange(len(rows))}.get(str(choice))
        first = int(choice) if first is None else first
        for row in ((first + i) % len(rows) for i in range(min(self.eval.examples, len(rows)))):
            if (answer := self.answer(row)) is not None:
                prompt = " ".join(self.tokenizer.decode(rows.prompt(row)).split())
                self.screen.say(f"example, {when}: {prompt[-200:]}\n  -> {shorten(answer, 600)}")

    def count_exact(self, when: str) -> None:
        rows = self.dataset.val
        if self.eval.exact_match:
            total = min(self.eval.exact_match, len(rows))
            exact = sum(self.answer(i) == self.tokenizer.decode(rows.answer(i)).strip() for i in range(total))
            self.scores.append(exact / total)
            self.screen.say(f"exact answers, {when}: {exact} of {total} validation rows ({exact / total:.1%})")

    def answer(self, row: int) -> Optional[str]:
        """The answer to the prompt of one validation row; None for plain text, which has no prompt."""
        ids = self.dataset.val.prompt(row)
        if not 0 < len(ids) < self.model.gpt.config.block_size:
            return None
        training = self.model.training
        self.model.eval()
        try:
            stops = self.tokenizer.stops(self.dataset.style)
            limit = self.eval.max_new_tokens or 0
            answer = self.model.read(lambda gpt: list(generate(gpt, ids, limit, FirstRankGreedy(), stops)))
        finally:
            self.model.train(training)
        return self.tokenizer.decode(answer).strip()


def shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
