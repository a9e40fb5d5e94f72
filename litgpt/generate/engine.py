"""Decoding many texts at once with a cache.

Shapes: B texts, T tokens, V = padded_vocab_size.
"""

import random
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import torch

from litgpt.errors import UserError
from litgpt.generate.adapters import Adapters
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT, KVCache
from litgpt.text.tokenizer import TooLong

GREEDY = Sampling(temperature=0.0)
CHUNK = 512  # tokens of prompts that are read at once
Finish = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class Request:
    """One prompt and what follows it: a request to an `Engine`, which fills in the answer.

    Args:
        prompt: Token ids.
        max_new_tokens: The length of the answer, at most.
        sampling: How tokens are drawn.
        stop_ids: Tokens that end the answer; they are left out.
        seed: The same seed draws the same answer, whatever else is decoded at the same time.
        logprobs: For so many of the likeliest tokens at each place their log-probabilities are kept, and for the token
            that was taken; None for none at all.
        adapter: The name of one of the engine's adapters; None for the model as it is.
        tag: Whatever the caller wants to find again.

    Attributes:
        ids: The answer so far.
        finish: Why it ended: at a stop token, at its length or at the model's last position, or because `cancel` was
            called. None while it goes on.
        token_logprobs: For each token of the answer its log-probability, in nats, by the model (before temperature and
            all limits).
        top_logprobs: For each token of the answer the likeliest tokens and theirs.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: Collection[int] = ()
    seed: int = 1234
    logprobs: Optional[int] = None
    adapter: Optional[str] = None
    tag: Any = None
    ids: list[int] = field(default_factory=list, init=False)
    finish: Optional[Finish] = field(default=None, init=False)
    token_logprobs: list[float] = field(default_factory=list, init=False)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.numbers = random.Random(self.seed)

    def cancel(self) -> None:
        """End the answer; its place is free with the next step."""
        self.finish = self.finish or "cancelled"

    def check(self, model: GPT) -> None:
        """Raises:
        TooLong: the prompt fills the whole context.
        UserError: it is empty or has tokens that the model does not know.
        """
        most, known = model.config.block_size, model.config.padded_vocab_size
        if not self.prompt:
            raise UserError("The prompt is empty.")
        if len(self.prompt) >= most:
            raise TooLong(f"The prompt has {len(self.prompt)} tokens; the model reads at most {most}.")
        if max(self.prompt) >= known:
            raise UserError(
                f"The prompt has the token {max(self.prompt)}, the model only knows those below {known}: the tokenizer "
                "belongs to another model."
            )


class Engine:
    """Decodes up to `rows` texts at once; when one is finished the next that waits takes its place.

    A step reads at most `CHUNK` tokens of prompts, so that long ones do not hold up the others, and adds one token to
    every text whose prompt was read. Texts are laid end to end and do not see each other. What a finished text left in
    the cache serves the next prompt that begins with the same tokens.

    Args:
        model: In evaluation mode.
        rows: How many texts are decoded at once.
        max_length: Tokens of a text, prompt and answer, at most; by default what the model reads.
        adapters: Those that a text may name.
    """

    def __init__(
        self, model: GPT, rows: int = 16, max_length: Optional[int] = None, adapters: Optional[Adapters] = None
    ) -> None:
        self.model, self.adapters = model, adapters or Adapters()
        self.max_length = min(max_length or model.config.block_size, model.config.block_size)
        self.cache = KVCache(model.config)
        self.rows: list[Optional[Request]] = [None] * rows
        self.clear()

    def clear(self) -> None:
        """Drop all texts, and free the cache."""
        self.cache.clear()
        self.rows = [None] * len(self.rows)
        self.known: list[list[int]] = [[] for _ in self.rows]  # the tokens that the cache has of each row
        self.readers: list[Optional[str]] = [None] * len(self.rows)  # the adapter that they were read with
        self.waiting: deque[Request] = deque()

    def submit(self, text: Request) -> Request:
        """Let a text wait for a place.

        Raises:
            UserError: as `Text.check`; at once.
        """
        text.check(self.model)
        self.waiting.append(text)
        return text

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.rows)

    def run(self, texts: Iterable[Request]) -> Iterator[Request]:
        """Decode texts and return each as it is finished; further ones are taken from `texts` when places are free."""
        source = iter(texts)
        more = True
        while more or self.busy:
            while more and len(self.waiting) + sum(text is not None for text in self.rows) < len(self.rows):
                text = next(source, None)
                if text is None:
                    more = False
                else:
                    self.submit(text)
            if self.busy:
                yield from (text for text in self.step() if text.finish)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Read a part of the prompts, and add a token to each text that is ready.

        After an error, or an interrupt, all texts are dropped and the cache is free, since it may be half written. It
        does not wait for whoever holds the traceback.

        Returns:
            The texts that got a token or are finished.
        """
        try:
            ended = self.leave()
            self.enter()
            reading = [row for row, text in enumerate(self.rows) if text and self.left(row) > 1]
            ready = [row for row, text in enumerate(self.rows) if text and self.left(row) == 1]
            new = self.read(reading) + (self.add(ready, [1] * len(ready)) if ready else [])
        except BaseException:
            self.clear()
            raise
        return ended + new

    def left(self, row: int) -> int:
        """Tokens of a row that are not read yet. The last one of a text waits to be read for the next one."""
        text = self.rows[row]
        assert text is not None
        return len(text.prompt) + len(text.ids) - len(self.known[row])

    def leave(self) -> list[Request]:
        """Free the rows of finished texts; those that were cancelled are returned, also from among the waiting."""
        ended = [text for text in self.waiting if text.finish]
        self.waiting = deque(text for text in self.waiting if not text.finish)
        for row, text in enumerate(self.rows):
            if text is not None and text.finish:
                self.rows[row] = None
                if text.finish == "cancelled":
                    ended.append(text)
        return ended

    def enter(self) -> None:
        """Give free rows to waiting texts: to each the one that knows most of its beginning."""
        free = [row for row, text in enumerate(self.rows) if text is None]
        while free and self.waiting:
            text = self.waiting.popleft()
            shared = {row: self.shared(row, text) for row in free}
            row = max(free, key=lambda r: (shared[r], -r))  # else the first one, so that the texts stand together
            free.remove(row)
            self.rows[row], self.readers[row] = text, text.adapter
            kept = self.cache.keep(row, shared[row])
            del self.known[row][kept:]
        self.close_gaps()

    def close_gaps(self) -> None:
        """Let the texts stand in the first rows: then attention reads their cache where it lies."""
        for row, text in enumerate(self.rows):
            last = max((r for r, other in enumerate(self.rows) if other is not None), default=-1)
            if text is None and last > row:
                self.cache.move(last, row)
                self.rows[row], self.rows[last] = self.rows[last], None
                self.known[row], self.known[last] = self.known[last], []
                self.readers[row] = self.readers[last]
                self.cache.keep(last, 0)

    def shared(self, row: int, text: Request) -> int:
        """How many tokens of a prompt a row's cache has; never all, since the last one is read for the next."""
        if self.model.switch is not None or self.readers[row] != text.adapter:  # of a text that was read otherwise
            return 0
        known, prompt = self.known[row], text.prompt
        pairs = zip(known, prompt[:-1])
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(known), len(prompt) - 1))

    def read(self, rows: Sequence[int]) -> list[Request]:
        """Read parts of prompts, in the order of the rows; the texts that got their first token."""
        chosen, lengths, room = [], [], CHUNK
        for row in rows:
            n = min(self.left(row), room)
            if n:
                chosen.append(row)
                lengths.append(n)
                room -= n
        return self.add(chosen, lengths) if chosen else []

    def add(self, rows: Sequence[int], lengths: Sequence[int]) -> list[Request]:
        """Read so many tokens of each row; the texts whose last token was read get a new one."""
        ids: list[int] = []
        self.adapters.choose([self.readers[row] for row in rows], lengths)
        for row, n in zip(rows, lengths):
            text, start = self.rows[row], len(self.known[row])
            assert text is not None
            new = list(text.prompt[start : start + n]) or text.ids[-1:]
            self.known[row] += new
            ids += new
        read = torch.tensor([ids], device=self.model.device)
        hidden = self.model.hidden(read, list(lengths), self.cache, list(rows))[0]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        done = [(row, end - 1) for row, end in zip(rows, ends) if self.left(row) == 0]
        if not done:
            return []
        if len(done) < len(hidden):
            hidden = hidden[torch.tensor([at for _, at in done], device=hidden.device)]
        self.adapters.choose([self.readers[row] for row, _ in done], [1] * len(done))
        return self.draw([text for row, _ in done if (text := self.rows[row])], self.model.lm_head(hidden))

    def draw(self, texts: Sequence[Request], logits: torch.Tensor) -> list[Request]:
        """Add a token to each text, from its logits (B, V)."""
        drawn: dict[int, int] = {}
        for sampling in dict.fromkeys(text.sampling for text in texts):
            same = [i for i, text in enumerate(texts) if text.sampling == sampling]
            own = logits if len(same) == len(texts) else logits[same]
            own = sampling.penalize(own, [[*texts[i].prompt, *texts[i].ids] for i in same])
            drawn.update(zip(same, sampling.draw(own, [texts[i].numbers for i in same]).tolist()))
        for i, text in enumerate(texts):
            self.extend(text, drawn[i], logits[i])
        return list(texts)

    def extend(self, text: Request, token: int, logits: torch.Tensor) -> None:
        if text.finish:
            return
        if token in text.stop_ids:
            text.finish = "stop"
            return
        text.ids.append(token)
        if text.logprobs is not None:
            logprobs = logits.float().log_softmax(-1)
            text.token_logprobs.append(float(logprobs[token]))
            top = logprobs.topk(text.logprobs)
            text.top_logprobs.append(list(zip(top.indices.tolist(), top.values.tolist())))
        if len(text.ids) >= text.max_new_tokens or len(text.prompt) + len(text.ids) >= self.max_length:
            text.finish = "length"


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    seed: int = 1234,
) -> Iterator[int]:
    """The ids that follow `prompt`, one by one, up to a stop token (left out) or the model's last position.

    Raises:
        UserError: as `Text.check`; at once, not with the first id.
    """
    engine = Engine(model, rows=1)
    return follow(engine, engine.submit(Request(prompt, max_new_tokens, sampling, stop_ids, seed)))


def follow(engine: Engine, text: Request) -> Iterator[int]:
    """The ids of a submitted text as they come."""
    shown = 0
    while shown < len(text.ids) or not text.finish:
        if shown == len(text.ids):
            engine.step()
            continue
        yield text.ids[shown]
        shown += 1
