"""Decoding many sequences at once with a KV cache.

Shapes: B sequences, T tokens, V = padded_vocab_size.
"""

import random
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, Literal, Optional

import torch

from litgpt.errors import UserError
from litgpt.generate.adapters import Adapters
from litgpt.generate.sampling import Sampling
from litgpt.model.devices import to_device
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache
from litgpt.text.tokenizer import TooLong

GREEDY = Sampling(temperature=0.0)
CHUNK = 512  # tokens of prompts that are read at once
Finish = Literal["stop", "length", "cancelled"]  # length: its own maximum, or the model's last position


@dataclass(eq=False)
class Request:
    """A sequence to decode: a prompt, and the answer that an `Engine` fills in."""

    prompt: Sequence[int]
    max_new_tokens: Optional[int] = None  # by default, up to the model's last position
    sampling: Sampling = GREEDY
    stop_ids: Collection[int] = ()  # end the answer, and do not belong to it
    seed: int = 1234  # the same seed draws the same answer, whatever else is decoded at the same time
    logprobs: Optional[int] = None  # keep log-probabilities, also of this many of the most likely tokens
    adapter: Optional[str] = None  # one of the engine's; None for the base model
    tag: Any = None  # anything by which the caller recognizes the request

    ids: list[int] = field(default_factory=list, init=False)  # the answer so far
    finish: Optional[Finish] = field(default=None, init=False)  # why it ended; None while it goes on
    # in nats, by the model (before temperature and all limits), at the place of each token of the answer
    token_logprobs: list[float] = field(default_factory=list, init=False)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.generator = random.Random(self.seed)

    def cancel(self) -> None:
        """End the answer. Its row is free with the next step."""
        self.finish = self.finish or "cancelled"

    def add(self, token: int, max_length: int) -> bool:
        """Add a token to the answer, or end it. Returns whether the token belongs to the answer. Prompt and answer
        have at most `max_length` tokens."""
        if token in self.stop_ids:
            self.finish = "stop"
            return False
        self.ids.append(token)
        n_new = len(self.ids)
        if n_new == self.max_new_tokens or len(self.prompt) + n_new >= max_length:
            self.finish = "length"
        return True

    def check(self, model: GPT) -> None:
        """Raises `TooLong` if the prompt fills the whole context, and `UserError` if it is empty or has tokens that the
        model does not know."""
        limit, vocab_size = model.config.block_size, model.config.padded_vocab_size
        if not self.prompt:
            raise UserError("The prompt is empty.")
        if len(self.prompt) >= limit:
            raise TooLong(f"The prompt has {len(self.prompt)} tokens; the model reads at most {limit}.")
        if max(self.prompt) >= vocab_size:
            raise UserError(
                f"The prompt has token {max(self.prompt)}; the model only knows those below {vocab_size}. The "
                "tokenizer belongs to another model."
            )


class Engine:
    """Decodes up to `rows` requests at once. When one is finished, the next one takes its row.

    A step reads at most `CHUNK` tokens of prompts, so that long ones do not hold up the others, and adds one token to
    every request whose prompt was read. Sequences are laid end to end and do not see each other. What a finished
    request left in the cache serves the next prompt that begins with the same tokens.

    Args:
        model: In evaluation mode.
        max_length: Maximum number of tokens in prompt and answer; by default what the model reads.
        adapters: Those that a request may name.
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
        """Drop all requests, and free the cache."""
        self.cache.clear()
        self.rows = [None] * len(self.rows)
        self.cached: list[list[int]] = [[] for _ in self.rows]  # the tokens that the cache has of each row
        self.cached_with: list[Optional[str]] = [None] * len(self.rows)  # the adapter that read them
        self.waiting: deque[Request] = deque()

    def submit(self, request: Request) -> Request:
        """Queue a request. Raises `UserError` as `Request.check`."""
        request.check(self.model)
        self.waiting.append(request)
        return request

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.rows)

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Decode requests, and yield each when it is finished."""
        return (request for request in self.grow(requests) if request.finish)

    def grow(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Decode requests, and yield each whenever it got a token or ended. They are taken from the iterable as rows
        become free."""
        source = iter(requests)
        while True:
            n_running = len(self.waiting) + sum(request is not None and not request.finish for request in self.rows)
            for request in islice(source, max(0, len(self.rows) - n_running)):
                self.submit(request)
            if not self.busy:
                return
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Read a part of the prompts, and add a token to each request whose prompt was read.

        Returns the requests that got a token or ended. After an error or an interrupt all requests are dropped and the
        cache is freed, since it may be half written. This does not wait for whoever holds the traceback.
        """
        try:
            ended = self.release_rows()
            self.fill_rows()
            prefill, decode, room = dict[int, int](), dict[int, int](), CHUNK
            for row, request in enumerate(self.rows):
                n = self.n_unread(row) if request else 0
                if n == 1:
                    decode[row] = 1
                elif n and room:
                    prefill[row] = min(n, room)
                    room -= prefill[row]
            parts = [*self.passes(prefill), *self.passes(decode)]
            grown = [request for part in parts for request in self.forward(part)]
        except BaseException:
            self.clear()
            raise
        return ended + grown

    def passes(self, n_tokens: dict[int, int]) -> list[dict[int, int]]:
        """The rows of each forward pass: all of them, or those of one adapter after the other."""
        if not self.adapters.uniform:
            return [n_tokens]
        names = dict.fromkeys(self.cached_with[row] for row in n_tokens)
        return [{row: n for row, n in n_tokens.items() if self.cached_with[row] == name} for name in names]

    def n_unread(self, row: int) -> int:
        """Tokens of a row that are not in the cache. The last token of a sequence is read to get the next one."""
        request = self.rows[row]
        assert request is not None
        return len(request.prompt) + len(request.ids) - len(self.cached[row])

    def release_rows(self) -> list[Request]:
        """Free the rows of finished requests. Returns the canceled ones, also those that were waiting."""
        ended = [request for request in self.waiting if request.finish]
        self.waiting = deque(request for request in self.waiting if not request.finish)
        for row, request in enumerate(self.rows):
            if request is not None and request.finish:
                self.rows[row] = None
                if request.finish == "cancelled":
                    ended.append(request)
        return ended

    def fill_rows(self) -> None:
        """Give free rows to waiting requests: to each the one whose cache has most of its prompt."""
        free = [row for row, request in enumerate(self.rows) if request is None]
        while free and self.waiting:
            request = self.waiting.popleft()
            shared = {row: self.n_shared(row, request) for row in free}
            row = max(free, key=lambda r: (shared[r], -r))  # the first one of several
            free.remove(row)
            self.rows[row], self.cached_with[row] = request, request.adapter
            kept = self.cache.keep(row, shared[row])
            del self.cached[row][kept:]
        self.close_gaps()

    def close_gaps(self) -> None:
        """Move the requests to the first rows: then attention reads their cache in place."""
        for row, request in enumerate(self.rows):
            last = max((r for r, other in enumerate(self.rows) if other is not None), default=-1)
            if request is None and last > row:
                self.cache.copy(last, [row])
                self.rows[row], self.rows[last] = self.rows[last], None
                self.cached[row], self.cached[last] = self.cached[last], []
                self.cached_with[row] = self.cached_with[last]
                self.cache.keep(last, 0)

    def n_shared(self, row: int, request: Request) -> int:
        """How many tokens of a prompt a row's cache has. Never all, since the last one is read to get the next."""
        if self.model.switch is not None or self.cached_with[row] != request.adapter:  # the same tokens differ
            return 0
        return common_prefix(self.cached[row], request.prompt[:-1])

    def forward(self, n_tokens: Mapping[int, int]) -> list[Request]:
        """Read this many tokens of each row. Requests whose last token was read get a new one, and are returned."""
        if not n_tokens:
            return []
        ids: list[int] = []
        rows, lengths = list(n_tokens), list(n_tokens.values())
        self.adapters.choose([self.cached_with[row] for row in rows], lengths, self.model.device)
        for row, n in n_tokens.items():
            request, start = self.rows[row], len(self.cached[row])
            assert request is not None
            new = list(request.prompt[start : start + n]) or request.ids[-1:]
            self.cached[row] += new
            ids += new
        hidden = self.model.hidden(torch.tensor([ids]), lengths, self.cache, rows)[0]
        ends = accumulate(lengths)
        done = [(row, end - 1) for row, end in zip(rows, ends) if self.n_unread(row) == 0]
        if not done:
            return []
        if len(done) < len(hidden):
            hidden = hidden[to_device(hidden.device, torch.tensor([at for _, at in done]))[0]]
        self.adapters.choose([self.cached_with[row] for row, _ in done], [1] * len(done), self.model.device)
        return self.draw([request for row, _ in done if (request := self.rows[row])], self.model.lm_head(hidden))

    def draw(self, requests: Sequence[Request], logits: torch.Tensor) -> list[Request]:
        """Add a token to each request, from its logits (B, V)."""
        tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        for sampling in dict.fromkeys(request.sampling for request in requests):
            same = [i for i, request in enumerate(requests) if request.sampling == sampling]
            chosen = slice(None) if len(same) == len(requests) else to_device(logits.device, torch.tensor(same))[0]
            own = sampling.penalize(logits[chosen], [[*requests[i].prompt, *requests[i].ids] for i in same])
            tokens[chosen] = sampling.draw(own, [requests[i].generator for i in same])
        found = [tokens]
        for i, request in enumerate(requests):
            if request.logprobs is not None:
                logprobs = logits[i].float().log_softmax(-1)
                found += [logprobs.gather(0, tokens[i : i + 1]), *logprobs.topk(request.logprobs)]
        # the one time that the host waits for the device; float32 is exact for ids up to 2^24
        values = iter(torch.cat([x.float() for x in found]).tolist())
        ids = [int(x) for x in islice(values, len(requests))]
        for request, token in zip(requests, ids):
            added = not request.finish and request.add(token, self.max_length)
            if (n := request.logprobs) is not None:
                logprob, likely, likely_ids = next(values), list(islice(values, n)), [*map(int, islice(values, n))]
                if added:
                    request.token_logprobs.append(logprob)
                    request.top_logprobs.append(list(zip(likely_ids, likely)))
        return list(requests)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens at the beginning of two sequences that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    seed: int = 1234,
) -> Iterator[int]:
    """The ids that follow `prompt`, one by one, up to a stop token (not included) or the model's last position. Raises
    `UserError` as `Request.check`; at once, not with the first id."""
    engine = Engine(model, rows=1)
    request = engine.submit(Request(prompt, max_new_tokens, sampling, stop_ids, seed))

    def new_ids() -> Iterator[int]:
        while not request.finish:
            n = len(request.ids)
            engine.step()
            yield from request.ids[n:]

    return new_ids()
