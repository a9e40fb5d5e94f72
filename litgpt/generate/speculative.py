"""Speculative decoding (https://arxiv.org/abs/2211.17192): a small model drafts some tokens, the large one reads them
all at once and keeps those that it agrees with.

Shapes: K drafted tokens, V = the target's padded_vocab_size.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from litgpt.errors import UserError
from litgpt.generate.engine import CHUNK, GREEDY, Request
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT, KVCache
from litgpt.text.tokenizer import Tokenizer

SAMPLE = "Hello, world! 12 + 30 = 42\n\tdef f(x): return 'naïve café, 東京, 😀'"


class Reader:
    """A model that reads versions of one text, and what they share only once.

    A layer with a sliding window cannot go back: where the text is longer than that, a rejected token has all of it
    read again.
    """

    def __init__(self, model: GPT) -> None:
        self.model, self.cache = model, KVCache(model.config)
        self.ids: list[int] = []  # what the cache has

    @torch.no_grad()
    def read(self, ids: Sequence[int], n: int) -> torch.Tensor:
        """Logits (n, V) for what follows each of the last n tokens."""
        most = min(len(self.ids), len(ids) - n)
        shared = next((i for i in range(most) if self.ids[i] != ids[i]), most)
        switch = self.model.switch
        if switch is not None and shared <= switch < len(self.ids):  # a longer text rotates all of its tokens otherwise
            shared = 0
        if shared < len(self.ids):
            shared = self.cache.keep(0, shared)
        self.ids = list(ids)
        new, hidden = list(ids[shared:]), []
        for start in range(0, len(new), CHUNK):
            part = torch.tensor([new[start : start + CHUNK]], device=self.model.device)
            hidden.append(self.model.hidden(part, [part.size(1)], self.cache, [0])[0])
        return self.model.lm_head(torch.cat(hidden)[-n:])


@dataclass
class Speculation:
    """One model that drafts for another.

    Args:
        target: Whose text it is: greedily exactly its own, else drawn from its distribution.
        draft: Has the same tokenizer.
        k: How many tokens are drafted at a time, at most.

    Attributes:
        n_drafted: Tokens that were drafted so far.
        n_accepted: Those of them that the target kept.
    """

    target: GPT
    draft: GPT
    k: int = 3
    n_drafted: int = field(default=0, init=False)
    n_accepted: int = field(default=0, init=False)

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
        seed: int = 1234,
    ) -> Iterator[int]:
        """The ids that follow `prompt`, up to a stop token (left out) or the target's last position.

        Raises:
            UserError: as `Text.check`; at once.
        """
        Request(prompt, max_new_tokens).check(self.target)
        return self.follow(list(prompt), max_new_tokens, sampling, stop_ids, random.Random(seed))

    def follow(
        self, ids: list[int], room: int, sampling: Sampling, stop_ids: Collection[int], numbers: random.Random
    ) -> Iterator[int]:
        target, draft = Reader(self.target), Reader(self.draft)
        vocabulary = self.target.config.padded_vocab_size
        room = min(room, self.target.config.block_size - len(ids))

        def shares(logits: torch.Tensor, seen: Sequence[int]) -> torch.Tensor:
            """(V,)"""
            fitting = F.pad(logits, (0, vocabulary - logits.size(-1)), value=float("-inf"))
            return sampling.probabilities(sampling.penalize(fitting, [seen]))[0]

        while room > 0:
            drafted: list[int] = []
            q: list[torch.Tensor] = []
            for _ in range(min(self.k, room - 1, self.unswitched(ids)) if self.drafts(ids) else 0):
                if len(ids) + len(drafted) > self.draft.config.block_size:
                    break
                q.append(shares(draft.read([*ids, *drafted], 1), [*ids, *drafted]))
                drafted.append(pick(q[-1], numbers))
            logits = target.read([*ids, *drafted], len(drafted) + 1)
            p = [shares(logits[i : i + 1], [*ids, *drafted[:i]]) for i in range(len(drafted) + 1)]
            n, last = judge(p, q, drafted, numbers)
            self.n_drafted += len(drafted)
            self.n_accepted += n
            for token in (*drafted[:n], last):
                if token in stop_ids:
                    return
                yield token
                ids.append(token)
                room -= 1

    def drafts(self, ids: Sequence[int]) -> bool:
        """Whether the draft model knows all of these tokens: its embedding may be padded less than the target's."""
        return max(ids) < self.draft.config.padded_vocab_size

    def unswitched(self, ids: Sequence[int]) -> int:
        """How many tokens the target can read behind these before all of them rotate otherwise (longrope): what it says
        about the first of them would be that of a longer text."""
        switch = self.target.switch
        return switch - len(ids) if switch is not None and len(ids) <= switch else self.k


def judge(
    p: Sequence[torch.Tensor], q: Sequence[torch.Tensor], drafted: Sequence[int], numbers: random.Random
) -> tuple[int, int]:
    """How many of the drafted tokens are kept, and the token that follows them.

    A token is kept with probability min(1, p / q); instead of the first that is not, one is drawn from what p has more
    than q. So each token is distributed as p says (algorithm 1 of the paper).

    Args:
        p: What the target says at each place, (V,), K + 1 of them.
        q: What the draft says, K of them.
    """
    for i, token in enumerate(drafted):
        if numbers.random() * float(q[i][token]) >= float(p[i][token]):
            more = (p[i] - q[i].to(p[i].device)).clamp(min=0)
            return i, pick(more if float(more.sum()) > 0 else p[i], numbers)
    return len(drafted), pick(p[len(drafted)], numbers)


def pick(shares: torch.Tensor, numbers: random.Random) -> int:
    """A token drawn by shares (V,), which need not sum up to 1."""
    sums = shares.cumsum(dim=-1)
    place = int(torch.searchsorted(sums, numbers.random() * sums[-1], right=True))
    return min(place, int(shares.nonzero()[-1]))  # rounding may lead past the end


def check_pair(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises:
    UserError: two models have not the same tokens.
    """
    if target.vocab_size != draft.vocab_size or target.encode(SAMPLE) != draft.encode(SAMPLE):
        raise UserError(
            f"The draft model has another tokenizer ({draft.vocab_size:,} tokens) than the target "
            f"({target.vocab_size:,} tokens): both must be of one family."
        )
