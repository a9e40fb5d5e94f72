"""Surgery on the blocks of a model: recomputing what a backward pass needs, and compiling.

Both replace the `forward` of each block object, so that no parameter changes its name. Generation within a run, which
passes a cache, goes on as before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.model.attention import CausalSelfAttention, ForwardContext


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


def compile_blocks(model: GPT, decoding: bool = False) -> None:
    """Compile what is between the attentions, for all lengths at once.

    The attention itself, a loop over documents, stays as it is: it would be compiled anew for every list of lengths.
    To be called before `recompute`.

    Args:
        decoding: Compile the way with a cache; by default the one without.
    """
    for block in model.transformer.h:
        attention = block.attn
        assert isinstance(attention, CausalSelfAttention)
        attention.attend_within_sequences = torch.compiler.disable(attention.attend_within_sequences)  # type: ignore
        block.forward = compiled(block, decoding)


def compiled(block: nn.Module, decoding: bool) -> Callable[..., torch.Tensor]:
    eager, fast = block.forward, torch.compile(block.forward, dynamic=True)

    def wrapped(x: torch.Tensor, reading: ForwardContext) -> torch.Tensor:
        return fast(x, reading) if (reading.cache is not None) is decoding else eager(x, reading)

    return wrapped


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
