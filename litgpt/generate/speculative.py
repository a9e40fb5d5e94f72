"""Speculative decoding (https://arxiv.org/abs/2211.17192): a small model drafts tokens; the large one reads them all at
once and keeps those that it agrees with.

Shapes: K drafted tokens, V = the target's padded_vocab_size.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from litgpt.errors import UserError
from litgpt.generate.engine import CHUNK, Request, common_prefix
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache
from litgpt.text.tokenizer import Tokenizer

SAMPLE = "Hello, world! 12 + 30 = 42\n\tdef f(x): return 'naïve café, 東京, 😀'"


class Reader:
    """A model that reads versions of one text, and the prefix that they share only once.

    The cache of a layer with a sliding window cannot be rolled back: if the text is longer than the window, a rejected
    token makes it read all again.
    """

    def __init__(self, model: GPT) -> None:
        self.model, self.cache = model, KVCache(model.config)
        self.ids: list[int] = []  # what the cache has

    @torch.no_grad()
    def read(self, ids: Sequence[int], n: int) -> torch.Tensor:
        """Logits (n, V) for what follows each of the last n tokens."""
        shared = common_prefix(self.ids, ids[: len(ids) - n])
        switch = self.model.switch
        if switch is not None and shared <= switch < len(self.ids):  # a longer text has other positions (longrope)
            shared = 0
        if shared < len(self.ids):
            shared = self.cache.keep(0, shared)
        self.ids = list(ids)
        hidden = []
        for start in range(shared, len(ids), CHUNK):
            chunk = torch.tensor([list(ids[start : start + CHUNK])])
            hidden.append(self.model.hidden(chunk, [chunk.size(1)], self.cache, [0])[0])
        return self.model.lm_head(torch.cat(hidden)[-n:])


@dataclass
class Speculation:
    """A target model, and a draft model with the same tokenizer that proposes tokens to it.

    The target determines the text: greedily exactly its own, else drawn from its distribution.
    """

    target: GPT
    draft: GPT
    k: int = 3  # maximum number of tokens to draft at a time
    n_drafted: int = field(default=0, init=False)  # tokens so far
    n_accepted: int = field(default=0, init=False)  # those of them that the target accepted

    def grow(self, requests: Iterable[Request]) -> Iterator[Request]:
        """As `Engine.grow`, one request after another."""
        for request in requests:
            yield from self.decode(request)

    def decode(self, request: Request) -> Iterator[Request]:
        request.check(self.target)
        target, draft = Reader(self.target), Reader(self.draft)
        vocab_size, block_size = self.target.config.padded_vocab_size, self.target.config.block_size

        def probabilities(logits: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
            """(V,) for logits (1, vocabulary of either model)"""
            logits = F.pad(logits, (0, vocab_size - logits.size(-1)), value=float("-inf"))
            return request.sampling.probabilities(request.sampling.penalize(logits, [text]))[0]

        while not request.finish:
            ids = [*request.prompt, *request.ids]
            room = min((request.max_new_tokens or block_size) - len(request.ids), block_size - len(ids))
            drafted: list[int] = []
            q: list[torch.Tensor] = []
            for _ in range(min(self.n_draftable(ids), room - 1)):
                text = [*ids, *drafted]
                q.append(probabilities(draft.read(text, 1), text).cpu())
                drafted.append(draw(q[-1], request.generator))
            logits = target.read([*ids, *drafted], len(drafted) + 1)
            p = [probabilities(logits[i : i + 1], [*ids, *drafted[:i]]) for i in range(len(drafted) + 1)]
            n, last = accept(p, q, drafted, request.generator)
            self.n_drafted += len(drafted)
            self.n_accepted += n
            for token in (*drafted[:n], last):
                if not request.finish:
                    request.add(token, block_size)
                    yield request

    def n_draftable(self, ids: Sequence[int]) -> int:
        """How many tokens can be drafted behind these.

        Zero if the draft model does not know all of them (its embedding may be padded less than the target's). At most
        what its context has room for, and up to the length at which the target's positions change (longrope), where the
        logits for the first of them would be those of a longer text.
        """
        if max(ids) >= self.draft.config.padded_vocab_size:
            return 0
        n, switch = min(self.k, self.draft.config.block_size - len(ids) + 1), self.target.switch
        return min(n, switch - len(ids)) if switch is not None and len(ids) <= switch else n


def accept(
    p: Sequence[torch.Tensor], q: Sequence[torch.Tensor], drafted: Sequence[int], generator: random.Random
) -> tuple[int, int]:
    """How many of the drafted tokens are accepted, and the token that follows them.

    p has the target's probabilities (V,) at K + 1 places, q those of the draft model at K. A token is accepted with
    probability min(1, p / q). Instead of the first rejected one, a token is drawn from what p has more than q. So each
    token is distributed as p (algorithm 1 of the paper).
    """
    p = torch.stack(list(p)).cpu()  # type: ignore[assignment]  # once, not for each token
    for i, token in enumerate(drafted):
        if generator.random() * float(q[i][token]) >= float(p[i][token]):
            rest = (p[i] - q[i]).clamp(min=0)
            return i, draw(rest if float(rest.sum()) > 0 else p[i], generator)
    return len(drafted), draw(p[len(drafted)], generator)


def draw(weights: torch.Tensor, generator: random.Random) -> int:
    """An index into weights (V,), which need not add up to 1, drawn in proportion to them."""
    cumulative = weights.cumsum(dim=-1)
    index = int(torch.searchsorted(cumulative, generator.random() * cumulative[-1], right=True))
    return min(index, int(weights.nonzero()[-1]))  # rounding may lead past the end


def check_same_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises `UserError` if two models do not have the same tokens."""
    if target.vocab_size != draft.vocab_size or target.encode(SAMPLE) != draft.encode(SAMPLE):
        raise UserError(
            f"The draft model has another tokenizer ({draft.vocab_size:,} tokens) than the target "
            f"({target.vocab_size:,} tokens). Choose two models of one family."
        )
