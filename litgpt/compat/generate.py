"""`litgpt.generate.base`: LitGPT's functions for generating, over the engine here."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional, Union

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
    cache of a `litgpt.GPT`, which `set_kv_cache` begins; without one, `x` is the whole text."""
    if hasattr(model, "set_kv_cache"):
        logits = model(x, input_pos)
    elif int(input_pos.flatten()[0]) == 0:
        logits = model(x)
    else:
        raise UserError("This model has no key-value cache. Pass the whole text, or use generate.")
    return sample(logits, **sample_kwargs)


def batched_sample(logits: Sequence[torch.Tensor], kwargs: Sequence[dict[str, Any]]) -> torch.Tensor:
    """A token for each of several logits (1, T, V), (B, 1), with the options of `sample` for each."""
    return torch.stack([sample(one, **options) for one, options in zip(logits, kwargs)])


def batched_next_token(
    model: Any, input_pos: torch.Tensor, x: torch.Tensor, kwargs: Union[dict[str, Any], list[dict[str, Any]]]
) -> torch.Tensor:
    """`next_token` for the rows of `x` (B, T), (B, 1). The options of `sample` are for all rows, or for each."""
    options = kwargs if isinstance(kwargs, list) else [kwargs] * len(x)
    return batched_sample(model(x, input_pos).split(1), options)


def batched_generate_fn(
    model: Any,
    prompts: torch.Tensor,
    max_returned_tokens: int,
    *,
    sample_args: Union[dict[str, Any], list[dict[str, Any]]],
    stop_tokens: Sequence[Sequence[int]] = (),
    include_prompt: bool,
    include_eos: bool,
) -> Iterator[list[Optional[torch.Tensor]]]:
    """Yield the next token, (1,), of each of several prompts (B, T), or None if its answer has ended. The prompts are
    decoded one by one; `LLM.generate` decodes them together. Arguments as in `generate_fn`.

    Args:
        sample_args: The options of `sample`, for all prompts or for each.
    """
    rows = prompts if prompts.dim() == 2 else prompts[None]
    options = sample_args if isinstance(sample_args, list) else [sample_args] * len(rows)
    if len(options) != len(rows):
        raise UserError(f"sample_args has {len(options)} entries for {len(rows)} prompts.")
    own: dict[str, Any] = {"stop_tokens": stop_tokens, "include_prompt": False, "include_eos": include_eos}
    answers = [generate_fn(model, row, max_returned_tokens, **own, **o) for row, o in zip(rows, options)]
    if include_prompt:
        yield from (list(column[:, None]) for column in rows.T)
    yield from map(list, zip_longest(*answers))


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
