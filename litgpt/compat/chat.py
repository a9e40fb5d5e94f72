"""`litgpt.chat.base`: an answer token by token, and the command."""

from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch

from litgpt.commands.chat import main as main
from litgpt.compat.generate import generate_fn


def generate(
    model: Any,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[Sequence[int]] = (),
) -> Iterator[torch.Tensor]:
    """Yield the tokens of an answer, each (1,), without the sequence that ends it. Arguments as in
    `litgpt.generate.base.generate_fn`."""
    return generate_fn(
        model,
        prompt,
        max_returned_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        include_prompt=False,
        include_eos=False,
    )
