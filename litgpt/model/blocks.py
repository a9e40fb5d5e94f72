"""Activation checkpointing and compilation of the blocks of a model.

Both replace the `forward` of each block, so that no parameter changes its name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.errors import UserError
from litgpt.model.attention import CausalSelfAttention, ForwardContext
from litgpt.model.gpt import GPT


def recompute(model: GPT) -> None:
    """Activation checkpointing: keep only the input of each block, and run the block again in the backward pass.
    https://arxiv.org/abs/1604.06174. Dropout draws the same numbers again."""
    for block in model.transformer.h:
        block.forward = recomputed(block.forward)


def recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapped(*args: Any) -> torch.Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return wrapped


def compile_blocks(model: GPT, decoding: bool = False) -> None:
    """Compile each block except for attention, once for all lengths; with `decoding` the path with a cache instead of
    the one without. Call this before `recompute`. Attention, a loop over sequences, would be compiled again for every
    list of lengths."""
    for block in model.transformer.h:
        attention = block.attn
        assert isinstance(attention, CausalSelfAttention)
        attention.attend_within_sequences = torch.compiler.disable(attention.attend_within_sequences)  # type: ignore
        block.forward = compiled(block, decoding)


def compiled(block: nn.Module, decoding: bool) -> Callable[..., torch.Tensor]:
    eager, fast = block.forward, torch.compile(block.forward, dynamic=True)

    def wrapped(x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return fast(x, context) if (context.cache is not None) is decoding else eager(x, context)

    return wrapped


def check_compiler(device: torch.device) -> None:
    """Raises `UserError` if what `torch.compile` needs on this device is not installed."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        raise UserError("--compile true needs the package triton on a GPU, which is missing or too old. Install it.")
    try:
        if device.type not in ("cuda", "mps"):
            get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as e:
        raise UserError(
            "--compile true needs a C++ compiler on a CPU, and none was found. Install g++ or clang, or set CXX."
        ) from e
