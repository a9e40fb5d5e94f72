"""Decoding with a cache."""

from collections.abc import Collection, Iterator, Sequence
from typing import Optional

import torch

from litgpt.errors import UserError
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT, KVCache

GREEDY = Sampling(temperature=0.0)


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    generator: Optional[torch.Generator] = None,
) -> Iterator[int]:
    """The ids that follow `prompt`, one by one, up to a stop token (left out) or the model's last position.

    Raises:
        UserError: the prompt is empty, fills the whole context or has tokens that the model does not know; at once, not
            with the first id.
    """
    if not prompt:
        raise UserError("The prompt is empty.")
    room = model.config.block_size - len(prompt)
    if room < 1:
        raise UserError(f"The prompt has {len(prompt)} tokens; the model reads at most {model.config.block_size}.")
    known = model.config.padded_vocab_size
    if max(prompt) >= known:
        raise UserError(
            f"The prompt has the token {max(prompt)}, the model only knows those below {known}: the tokenizer belongs "
            "to another model."
        )
    return follow(model, prompt, min(max_new_tokens, room), sampling, stop_ids, generator)


@torch.no_grad()
def follow(
    model: GPT,
    prompt: Sequence[int],
    n: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    generator: Optional[torch.Generator],
) -> Iterator[int]:
    cache = KVCache(model.config)
    ids = torch.tensor([list(prompt)], device=model.device)
    for _ in range(n):
        hidden = model.hidden(ids, cache=cache)[:, -1]
        token = sampling.draw(model.lm_head(hidden), generator)
        if int(token) in stop_ids:
            return
        yield int(token)
        ids = token[:, None]
