"""What the model answers to validation prompts, before and after."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from litgpt.data.base import TokenizedDataset
from litgpt.generate.engine import generate
from litgpt.generate.sampling import Sampling
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import EvalArgs
from litgpt.train.faults import spared
from litgpt.train.loss import LossModel
from litgpt.train.progress import Screen


class FirstRank(Sampling):
    """The most likely token on the first rank, for all: if rounding made one of them stop earlier, the others would
    wait for it to run the blocks."""

    def draw(self, logits: torch.Tensor, numbers: Sequence[random.Random]) -> torch.Tensor:
        token = logits.argmax(dim=-1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(token, 0)
        return token


@dataclass
class Examples:
    """Answers greedily, so that before and after can be compared. All ranks have to take part.

    Args:
        scores: The share of exact answers each time they were counted.
        ranks: How many there are.
    """

    model: LossModel
    tokenizer: Tokenizer
    loaded: TokenizedDataset
    eval: EvalArgs
    scores: list[float] = field(default_factory=list)
    ranks: int = 1

    def show(self, screen: Screen, when: str) -> None:
        """Print some answers and, if it is wanted, the share of validation rows that are answered exactly."""
        if self.eval.max_new_tokens and len(self.loaded.val):
            with spared(f"The answers to examples, {when}, cannot be shown", self.ranks):
                self.show_answers(screen, when)
            with spared(f"The exact answers, {when}, cannot be counted", self.ranks):
                self.count_exact(screen, when)

    def show_answers(self, screen: Screen, when: str) -> None:
        rows, wanted = self.loaded.val, self.eval
        first = {"first": 0, "random": random.Random(0).randrange(len(rows))}.get(str(wanted.evaluate_example))
        first = int(wanted.evaluate_example) if first is None else first
        numbers = [(first + i) % len(rows) for i in range(min(wanted.examples, len(rows)))]
        for number in numbers:
            if (answer := self.answer(number)) is not None:
                prompt = " ".join(self.tokenizer.decode(rows.prompt(number)).split())
                screen.say(f"example, {when}: {prompt[-200:]}\n  -> {shorten(answer, 600)}")

    def count_exact(self, screen: Screen, when: str) -> None:
        rows = self.loaded.val
        if self.eval.exact_match:
            chosen = range(min(self.eval.exact_match, len(rows)))
            right = sum(self.answer(i) == self.tokenizer.decode(rows.answer(i)).strip() for i in chosen)
            self.scores.append(right / len(chosen))
            screen.say(f"exact answers, {when}: {right} of {len(chosen)} validation rows ({right / len(chosen):.1%})")

    def answer(self, number: int) -> str | None:
        """The answer to the prompt of one validation row; None for plain text, which has no prompt."""
        ids = self.loaded.val.prompt(number)
        if not 0 < len(ids) < self.model.gpt.config.block_size:
            return None
        training = self.model.training
        self.model.eval()
        try:
            stops = self.tokenizer.stops(self.loaded.style)
            most = self.eval.max_new_tokens or 0
            answer = self.model.read(lambda gpt: list(generate(gpt, ids, most, FirstRank(), stops)))
        finally:
            self.model.train(training)
        return self.tokenizer.decode(answer).strip()


def shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
