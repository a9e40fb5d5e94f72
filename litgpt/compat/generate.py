"""`litgpt.generate.base`: LitGPT's functions for generating, over the engine here."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.commands import generate as command
from litgpt.errors import UserError
from litgpt.generate import engine
from litgpt.generate.inference_model import DEFAULT_PROMPT
from litgpt.generate.sampling import Sampling


class TooMany(UserError, NotImplementedError):
    """More tokens are asked for than the model reads."""


def sample(
    logits: torch.Tensor, temperature: float = 1.0, top_k: Optional[int] = None, top_p: float = 1.0
) -> torch.Tensor:
    """A token, (1,), for the last of the logits (1, T, V), drawn with torch's generator."""
    sampling, last = Sampling(temperature, top_k, top_p), logits[0, -1:]
    return last.argmax(-1) if sampling.greedy else torch.multinomial(sampling.probabilities(last), 1)[0]


def next_token(
    model: Any, input_pos: torch.Tensor, x: torch.Tensor, input_pos_maxp1: Optional[int] = None, **sample_kwargs: Any
) -> torch.Tensor:
    """The token, (1,), that follows `x` (1, T), whose positions are `input_pos` (T,). Tokens before them come from the
    cache of a `litgpt.GPT`; the model within an `LLM` has none, and takes whole texts."""
    if hasattr(model, "set_kv_cache"):
        logits = model(x, input_pos)
    elif int(input_pos.flatten()[0]) == 0:
        logits = model(x)
    else:
        raise UserError("This model has no key-value cache. Pass the whole text, or use generate.")
    return sample(logits, **sample_kwargs)


def generate_fn(
    model: Any,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[Sequence[int]] = (),
    include_prompt: bool,
    include_eos: bool,
) -> Iterator[torch.Tensor]:
    """Yield the tokens that follow a prompt, each (1,).

    Args:
        model: A `litgpt.GPT`, or the model of an `LLM`.
        prompt: Token IDs, (T,).
        max_returned_tokens: The most tokens of the prompt and its answer together.
        stop_tokens: Sequences of IDs that end the answer.
        include_prompt: Whether to yield the prompt, (T,), first.
        include_eos: Whether to yield the sequence that ended the answer.
    """
    inner = getattr(model, "inner", getattr(model, "module", model))
    longest = getattr(model, "max_seq_length", inner.config.block_size)
    if max_returned_tokens - 1 > longest:
        raise TooMany(f"max_returned_tokens={max_returned_tokens}: the model reads at most {longest} tokens.")
    if max_returned_tokens <= len(prompt):
        raise UserError(f"max_returned_tokens={max_returned_tokens} leaves no room: the prompt has {len(prompt)}.")
    seed, sampling = int(torch.randint(2**31, ())), Sampling(temperature, top_k, top_p)
    n_new = max_returned_tokens - len(prompt)
    if include_prompt:
        yield prompt
    held: list[int] = []  # may be the beginning of a stop sequence
    for token in engine.generate(inner, prompt.tolist(), n_new, sampling, seed=seed):
        held.append(token)
        ended = next((list(stop) for stop in stop_tokens if held[-len(stop) :] == list(stop)), None)
        if ended is not None:
            yield from as_tensors(held if include_eos else held[: -len(ended)], prompt.device)
            return
        n_free = next(n for n in range(len(held) + 1) if n == len(held) or starts_stop(held[n:], stop_tokens))
        yield from as_tensors(held[:n_free], prompt.device)
        held = held[n_free:]
    yield from as_tensors(held, prompt.device)


def starts_stop(ids: list[int], stop_tokens: Sequence[Sequence[int]]) -> bool:
    return any(ids == list(stop[: len(ids)]) for stop in stop_tokens)


def as_tensors(ids: list[int], device: torch.device) -> Iterator[torch.Tensor]:
    return (torch.tensor([i], device=device) for i in ids)


def generate(
    model: Any,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    eos_id: Optional[int] = None,
    include_prompt: bool = True,
) -> torch.Tensor:
    """The tokens that follow a prompt, with the prompt before them and the EOS that ends them, (T,). Arguments as in
    `generate_fn`."""
    parts = generate_fn(
        model,
        prompt,
        max_returned_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=() if eos_id is None else ([eos_id],),
        include_prompt=include_prompt,
        include_eos=True,
    )
    found = list(parts)
    return torch.cat(found) if found else prompt.new_empty(0)


def main(checkpoint_dir: Path, prompt: str = DEFAULT_PROMPT, **options: Any) -> None:
    """The command `litgpt generate`, with its options."""
    command.main(Path(checkpoint_dir), prompt=prompt, **options)
