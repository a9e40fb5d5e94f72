"""The model's answers to validation prompts, before and after training."""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch

from litgpt.data.tokens import TokenizedRows
from litgpt.errors import UserError
from litgpt.generate.engine import Engine, Request
from litgpt.generate.sampling import Sampling
from litgpt.model.gpt import GPT
from litgpt.storage.fields import ID, misfit
from litgpt.storage.files import JSON_BYTES, parse_json, read_text
from litgpt.storage.outputs import write_single
from litgpt.text.prompt_style import PromptStyle
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.faults import spared
from litgpt.train.resume.folder import EXAMPLES

if TYPE_CHECKING:
    from litgpt.train.run import Run

MARK, MAX_NEW_TOKENS = "QUESTION", 100
ROWS, LENGTH = 50, 60  # for an example question: rows to look at, and characters
MOST_SEQUENCES, MOST_TOKENS = 64, 4096  # that are decoded at once: the cache takes memory besides training
RECORDED, QUESTIONS = 2000, 3  # characters of a text in the file, and prompts for the chat page
LINE = (  # of the file
    {"step": ID, **dict.fromkeys(("prompt", "reference", "answer"), str)},
    {"step": ID, "exact": ID, "rows": ID},
    {"step": ID, "question": str},
)


class FirstRankGreedy(Sampling):
    """Greedy decoding on the first rank for all ranks, so that rounding cannot make one of them stop earlier."""

    def draw(self, logits: torch.Tensor, numbers: Sequence[random.Random]) -> torch.Tensor:
        token = logits.argmax(dim=-1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(token, 0)
        return token


class Examples:
    """Shows greedy answers to validation prompts, and records them. All ranks have to call its methods."""

    def __init__(self, run: "Run") -> None:
        self.model, self.tokenizer, self.dataset = run.loss_model, run.tokenizer, run.dataset
        self.eval, self.result, self.screen = run.eval, run.result, run.screen
        self.ranks = run.fabric.world_size
        self.file = run.out_dir / EXAMPLES if run.is_first else None
        self.lines: list[dict[str, Any]] = []
        if run.checkpoint is not None:
            with suppress(UserError):
                lines = read_examples(run.checkpoint.parent / EXAMPLES)
                self.lines = [line for line in lines if line["step"] <= self.result.steps]
            self.write()

    def show(self, when: str) -> None:
        """Print some answers and, if requested, the fraction of exact answers. `when` is before or after."""
        if self.eval.max_new_tokens and len(self.dataset.val):
            self.lines = [line for line in self.lines if not line["step"]]
            with spared(f"Cannot show the examples ({when})", self.ranks):
                self.show_answers(when)
            with spared(f"Cannot count the exact answers ({when})", self.ranks):
                self.count_exact(when)
            with spared("Cannot record questions for the chat page", self.ranks):
                self.record_questions()
            self.write()

    def record(self, **line: Any) -> None:
        self.lines.append({"step": self.result.steps, **line})

    def write(self) -> None:
        if self.file is not None and self.lines:
            with spared(f"Cannot write {self.file}"):
                write_single(self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines))

    def show_answers(self, when: str) -> None:
        rows = self.chosen(self.eval.examples) if self.eval.evaluate_example is not None else []
        for row, answer in zip(rows, self.answers(rows)):
            if answer is not None:
                prompt = self.tokenizer.decode(self.dataset.val.prompt(row))
                self.screen.say(f"example, {when}: {' '.join(prompt.split())[-200:]}\n  -> {shorten(answer, 600)}")
                reference = expected_answer(self.tokenizer, self.dataset.val, row)
                prompt = "..." * (len(prompt) > RECORDED) + prompt[-RECORDED:]
                self.record(prompt=prompt, reference=cut(reference), answer=cut(answer))

    def record_questions(self) -> None:
        """Record prompts that are a single message, once in a run."""
        if not self.dataset.plain_text and not any("question" in line for line in self.lines):
            prompts = (prompt for row in self.chosen(ROWS) if 0 < len(prompt := self.prompt(row)) <= RECORDED)
            self.lines += [{"step": 0, "question": text} for text in dict.fromkeys(islice(prompts, QUESTIONS))]

    def chosen(self, n: int) -> list[int]:
        """The first `n` validation rows, starting with the one that the options choose."""
        total, choice = len(self.dataset.val), self.eval.evaluate_example
        first = random.Random(0).randrange(total) if choice == "random" else choice if isinstance(choice, int) else 0
        return [(first + i) % total for i in range(min(n, total))]

    def count_exact(self, when: str) -> None:
        rows = self.dataset.val
        if self.eval.exact_match:
            total = min(self.eval.exact_match, len(rows))
            answers = self.answers(range(total))
            exact = sum(answer == expected_answer(self.tokenizer, rows, i) for i, answer in enumerate(answers))
            self.result.scores.append(exact / total)
            self.record(exact=exact, rows=total)
            self.screen.say(f"exact answers, {when}: {exact} of {total} validation rows ({exact / total:.1%})")

    def answers(self, chosen: Sequence[int]) -> list[Optional[str]]:
        """The answers to the prompts of validation rows; None for plain text, which has no prompt."""
        return self.complete([self.dataset.val.prompt(row) for row in chosen])

    def complete(self, prompts: Sequence[list[int]]) -> list[Optional[str]]:
        """The answers to prompts; None for one that is empty or fills the context."""
        style, training, limit = self.dataset.style, self.model.training, self.eval.max_new_tokens or MAX_NEW_TOKENS
        self.model.eval()
        try:
            return self.model.read(lambda gpt: greedy_answers(gpt, self.tokenizer, prompts, style, limit))
        finally:
            self.model.train(training)

    def encode(self, message: str) -> list[int]:
        """The prompt of a message. Raises `UserError` if it cannot be encoded."""
        style, plain = self.dataset.style, self.dataset.plain_text
        return self.tokenizer.encode(message if plain else style.apply(message), plain or not style.own_special_tokens)

    def question(self) -> Optional[str]:
        """A prompt for a command line: that of a validation row that has a short one, else the beginning of the first,
        in one line. For plain text, the first words of a row. None if no row has such a prompt."""
        prompts = [self.prompt(row) for row in self.chosen(ROWS)] if len(self.dataset.val) else []
        usable = [p for p in prompts if p and p.isprintable() and not p.startswith("-")]
        short = next((p for p in usable if len(p) <= LENGTH), None)
        return short or (usable[0][:LENGTH].rpartition(" ")[0] or usable[0][:LENGTH] if usable else None)

    def prompt(self, row: int) -> str:
        """The text of a validation row's only message before its answer; empty if there are more."""
        rows = self.dataset.val
        ids = rows.prompt(row)
        if self.dataset.plain_text:
            return " ".join(self.tokenizer.decode(rows.row(row)[0][:LENGTH].tolist()).split())

        before, _, after = self.tokenizer.decode(self.encode(MARK)).partition(MARK)
        text = self.tokenizer.decode(ids).removeprefix(before).removesuffix(after).strip()
        return text if self.encode(text) == ids else ""


def greedy_answers(
    gpt: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    style: PromptStyle,
    limit: int,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Optional[str]]:
    """The answers of at most `limit` tokens to prompts; None for an empty one, as plain text has, and for one that
    fills the context."""
    stops, sampling = tokenizer.stops(style), FirstRankGreedy()
    usable = {i: ids for i, ids in enumerate(prompts) if 0 < len(ids) < gpt.config.block_size}
    longest = max(map(len, usable.values()), default=1) + limit
    engine = Engine(gpt, rows=max(1, min(MOST_SEQUENCES, MOST_TOKENS // longest, len(usable))))
    requests = [Request(ids, limit, sampling, stops, tag=i) for i, ids in usable.items()]
    answers = dict[int, str]()
    for request in engine.run(requests):
        answers[request.tag] = tokenizer.decode(request.ids).strip()
        show(len(answers), len(requests))
    return [answers.get(i) for i in range(len(prompts))]


def expected_answer(tokenizer: Tokenizer, rows: TokenizedRows, row: int) -> str:
    return tokenizer.decode(rows.answer(row)).strip()


def read_examples(file: Path) -> list[dict[str, Any]]:
    """The lines of the file of examples, without those that are damaged. Raises `UserError` if it cannot be read."""
    found = []
    for text in read_text(file, JSON_BYTES).split("\n"):
        with suppress(ValueError):
            if misfit(line := parse_json(text), LINE) is None:
                found.append(line)
    return found


def cut(text: str) -> str:
    return text[:RECORDED] + "..." * (len(text) > RECORDED)


def shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
