"""Surgery on the blocks of a model that is about to be trained: recomputing and compiling them.

Both replace the `forward` of each block object, so that no parameter changes its name. Generation, which passes a
cache, goes on as before.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.errors import UserError
from litgpt.model import GPT, attention


def recompute(model: GPT) -> None:
    """Keep only the input of each block, and run the block again in the backward pass (https://arxiv.org/abs/1604.06174).

    Dropout draws the same again.
    """
    for block in model.transformer.h:
        block.forward = recomputed(block.forward)


def recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapped(*args: Any) -> torch.Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return wrapped


class Documents:
    """Lengths of documents that the compiler does not look into: it would compile anew for every list of them."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths


def compile_blocks(model: GPT) -> None:
    """Compile what is between the attentions, for all lengths at once.

    The attention itself, a loop over documents, stays as it is. To be called before `recompute`.
    """
    attention.attend = uncompiled(attention.attend)
    for block in model.transformer.h:
        block.forward = compiled(block)


def compiled(block: nn.Module) -> Callable[..., torch.Tensor]:
    eager, fast = block.forward, torch.compile(block.forward, dynamic=True)

    def wrapped(x: torch.Tensor, rope: Any, documents: Optional[list[int]], cache: Any) -> torch.Tensor:
        if documents is None or cache is not None:
            return eager(x, rope, documents, cache)
        return fast(x, rope, Documents(documents), cache)

    return wrapped


def uncompiled(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`attend`, out of the compiler's sight, for plain lists and for `Documents`."""
    if hasattr(attend, "_torchdynamo_disable"):  # from an earlier run of this process
        return attend

    def wrapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Any, *more: Any) -> torch.Tensor:
        return attend(q, k, v, documents.lengths if isinstance(documents, Documents) else documents, *more)

    return torch.compiler.disable(wrapped)


def check_compiler(device: torch.device) -> None:
    """Raises:
    UserError: what `torch.compile` needs on this device is not installed.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("--compile true needs the package triton on a GPU; it is not installed or too old.")
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as e:
            raise UserError(
                "--compile true needs a C++ compiler on a CPU, and none was found: install g++ or clang, or set CXX."
            ) from e
