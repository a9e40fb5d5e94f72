"""Stand-ins for kernels of a GPU, which keep in memory what those keep. They compute nothing.

Without a GPU, torch decomposes an RMSNorm and writes attention out. On a GPU, a norm keeps its input and one float32
number per row; attention keeps q, k, v, its output and one float32 number per row and head.

Shapes: T tokens, n query heads, g key-value heads, hs head size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from litgpt.model import attention_kernels, kernels
from litgpt.model.blocks import Offload
from litgpt.train import optimizers


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class Attention(torch.autograd.Function):
    """`q` is (..., n, T, hs) or (T, n, hs), and `k` and `v` have g heads in place of n."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(q)  # in the memory order of q
        y = y if q.size(-1) == v.size(-1) else y.new_empty(*q.shape[:-1], v.size(-1))
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        q, k, v, *_ = ctx.saved_tensors
        # flash attention adds up the gradient of q in float32, and those of k and v for every query head
        work = q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(q), torch.empty_like(q)
        found = tuple(torch.empty_like(t) for t in (q, k, v))
        del work
        return found


def rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return Norm.apply(x, weight)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return Attention.apply(q, k, v)


@contextmanager
def gpu_kernels() -> Iterator[list[int]]:
    """Run the code of a GPU, on any device, with stand-ins for its kernels. Yields a list to which the bytes of each
    tensor that is offloaded to the CPU are added."""
    offloaded: list[int] = []

    def pack(self: Offload, x: torch.Tensor) -> Any:
        offloaded.append(x.numel() * x.element_size())
        return x.size(), x.dtype, x.device

    def unpack(self: Offload, kept: Any) -> torch.Tensor:
        size, dtype, device = kept
        return torch.empty(size, dtype=dtype, device=device)

    replacements: list[tuple[Any, str, Any]] = [
        (Offload, "pack", pack),
        (Offload, "unpack", unpack),
        (kernels, "enabled", False),
        (F, "rms_norm", rms_norm),
        (F, "scaled_dot_product_attention", attention),
        (attention_kernels, "has_varlen", lambda q, v: attention_kernels.has_flash(v)),
        (attention_kernels, "varlen", lambda: attention),
        (optimizers, "CHUNK", {}),
        (optimizers.StochasticRounding, "draw", lambda self, n: torch.empty(n, dtype=torch.int32)),
    ]
    with ExitStack() as stack:
        for module, name, value in replacements:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield offloaded
