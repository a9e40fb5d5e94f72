"""Activation checkpointing and compilation of the blocks of a model.

Both replace the `forward` of each block, so that no parameter changes its name.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.errors import UserError
from litgpt.model.attention import CausalSelfAttention, ForwardContext
from litgpt.model.gpt import GPT


def recompute(model: GPT, offload: bool = False) -> None:
    """Activation checkpointing: keep only the input of each block, and run the block again in the backward pass.
    https://arxiv.org/abs/1604.06174. Dropout draws the same numbers again. With `offload` the inputs are kept in the
    memory of the CPU."""
    for block in model.transformer.h:
        block.forward = recomputed(block.forward)
    if offload:
        model.saved_tensors = Offload


def recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapped(*args: Any) -> torch.Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return wrapped


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what autograd saves in pinned memory of the CPU until the backward pass needs it. Copies to the CPU run
    beside the computation."""

    def __init__(self, x: torch.Tensor) -> None:
        self.stream: Optional[torch.cuda.Stream] = None
        super().__init__(self.pack, self.unpack)

    def pack(self, x: torch.Tensor) -> Any:
        if not x.is_cuda:
            return x.detach()
        self.stream = self.stream or torch.cuda.Stream(x.device)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            kept = torch.empty(x.size(), dtype=x.dtype, pin_memory=True)
            kept.copy_(x, non_blocking=True)
        x.record_stream(self.stream)
        return x.device, kept

    def unpack(self, kept: Any) -> torch.Tensor:
        if torch.is_tensor(kept):
            return kept
        device, x = kept
        torch.cuda.current_stream(device).wait_stream(self.stream)  # type: ignore[arg-type]
        return x.to(device, non_blocking=True)


def compile_blocks(model: GPT, decoding: bool = False) -> None:
    """Compile each block except for attention, once for all lengths; with `decoding` the path with a cache instead of
    the one without. Call this before `recompute`. Attention, a loop over sequences, would be compiled again for every
    list of lengths."""
    for block in model.transformer.h:
        loop = "attend_within_sequences" if isinstance(block.attn, CausalSelfAttention) else "forward"
        setattr(block.attn, loop, torch.compiler.disable(getattr(block.attn, loop)))
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
