"""Faster versions of the operations in `litgpt.model.kernels` for a CPU.

Shapes: n tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from litgpt.model import attention_kernels as attention_kernels  # whose operations are registered here
from litgpt.model import kernels
from litgpt.model.chunked_attention import ROUND, CausalAttention, Scores, chunk_size, join, rounded
from litgpt.model.delta_rule import chunked_delta_rule
from litgpt.model.packing import Packing
from litgpt.model.state_space import chunked_state_space

LARGE = 2**24  # multiplications from which oneDNN is faster than MKL
SMALL = 2**19  # the same for fewer than ROUND tokens
TINY = 2**13  # numbers in the queries of a sequence up to which sequences are padded and computed together
PREPACKED_TOKENS = 16  # that prepacked weights are laid out for: a layout for single tokens is slower even for them
PREPACKED_SIZE = {torch.float32: 2**18, torch.bfloat16: 2**14}  # of a weight from which prepacking pays
TILE_ROWS = 32  # of a prepacked 4-bit weight
NORM_SIZE = 2**14  # inputs from which `RMSNorm` pays
QUERIES = 256  # the largest chunk of causal attention
SCORES = {torch.float32: 2**18, torch.bfloat16: 2**20}  # attention scores that stay in the processor's cache
SHORT = 2**19  # scores of all heads up to which the attention weights are kept for the backward pass
LOGITS = 2**19  # logits that stay in it
HEAD_LOGITS = 2**24  # logits that the loss computes at once

register = kernels.register("cpu")


@register
def remat(x: torch.Tensor, function: Callable[..., torch.Tensor], *others: Any) -> torch.Tensor:
    """Keeps all results: a CPU has memory, and is slow at anything but matmuls."""
    return function(x, *others)


@register
def saved_tensors(x: torch.Tensor) -> AbstractContextManager:
    return nullcontext()


@register
def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Float32 by oneDNN, which uses AVX-512 on processors of any make. MKL, torch's choice, uses half of it on AMD. The
    sums have the same precision, in another order."""
    n = x.shape[:-1].numel()
    if weight.is_mkldnn:
        assert not (x.requires_grad and torch.is_grad_enabled()), "prepacked weights have no gradient: undo prepacking"
    elif torch.is_autocast_enabled("cpu") or not (x.dtype == weight.dtype == torch.float32 and onednn()):
        return NotImplemented
    elif torch.is_grad_enabled():
        if n % ROUND or n * weight.numel() < LARGE:
            return NotImplemented
        y = Matmul.apply(x, weight)
        return y if bias is None else y + bias
    elif n * weight.numel() < (SMALL if n < ROUND else LARGE):
        return NotImplemented
    if n < ROUND or n % ROUND == 0:
        return matmul(x, weight, bias)
    parts = x.flatten(0, -2).split([n - n % ROUND, n % ROUND])
    return torch.cat([matmul(part, weight, bias) for part in parts]).unflatten(0, x.shape[:-1])


@cache
def onednn() -> bool:
    """Whether this torch and this processor support `matmul`."""
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512"


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x (..., in_features) times the transposed weight (out_features, in_features), without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Matmul(torch.autograd.Function):
    """`matmul` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        # not a view: LoRA and the loss change the result in place, and autograd would copy a view
        return torch.ops.aten._unsafe_view(matmul(x.flatten(0, -2), weight), [*x.shape[:-1], len(weight)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        grad, grad_weight = grads[0].flatten(0, -2), None
        grad_x = matmul(grad, weight.t()).view(*grads[0].shape[:-1], -1) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:  # oneDNN copies the first factor: pass the narrower one first
            wide, narrow = grad.t(), x.flatten(0, -2).t()
            grad_weight = matmul(narrow, wide).t() if len(wide) > len(narrow) else matmul(wide, narrow)
        return grad_x, grad_weight


@register
def prepacked(weight: torch.Tensor) -> Optional[torch.Tensor]:
    if weight.numel() < PREPACKED_SIZE.get(weight.dtype, math.inf) or weight.is_mkldnn or not onednn():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight, PREPACKED_TOKENS)


@register
def prepacked_4bit(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """By the function that `transformers` uses for inference; it rounds the scales to bfloat16."""
    from bitsandbytes import functional

    rows, columns = state.shape
    fits = rows % TILE_ROWS == 0 and columns % state.blocksize == 0 and state.dtype == torch.bfloat16
    if not (fits and onednn() and getattr(functional, "has_avx512bf16", bool)()):
        return NotImplemented
    return functional._convert_weight_packed_for_cpu(weight, state, TILE_ROWS)


@register
def stacked(weight: torch.Tensor, *others: torch.Tensor) -> Optional[torch.Tensor]:
    """Experts one by one are as fast."""
    return None


@register
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, upcast: bool = False) -> torch.Tensor:
    return RMSNorm.apply(x, weight, eps) if x.numel() >= NORM_SIZE else NotImplemented


class RMSNorm(torch.autograd.Function):
    """`F.rms_norm` in few steps. Torch decomposes its own into many, which take seven times as long in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x_32 = x.float()
        norms = torch.linalg.vector_norm(x_32, dim=-1, keepdim=True)
        inverse = norms.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x_32 * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grads[0].float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).div_(x.size(-1)).unsqueeze(-1)
        return grad.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), grad_weight, None


@register
def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Draws 16 bits for each input, in a quarter of the time of torch's 64. The dropped share is the nearest multiple
    of 2^-16, and the mean is exact. The backward pass keeps a byte per input."""
    n_dropped = min(round(p * 2**16), 2**16 - 1)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = drawn[: x.numel()].view(x.shape) >= n_dropped - 2**15
    return Kept.apply(x, kept, 2**16 / (2**16 - n_dropped))


class Kept(torch.autograd.Function):
    """The kept inputs, scaled; the others are 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x * kept).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return (grads[0] * ctx.saved_tensors[0]).mul_(ctx.scale), None, None


@register
def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Two thirds of the time of torch's fused kernel in float32, less than half in bfloat16."""
    keep = q.size(1) * q.size(2) ** 2 <= SHORT
    return CausalAttention.of(q, k, v, scores, chunk_size(q, SCORES.get(v.dtype, 0), QUERIES), keep)


@register
def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, packing: Packing
) -> torch.Tensor:
    """One sequence after another, without padding, unless they are so short that calls take longer than the work."""
    if q.size(1) * q.size(3) * packing.longest <= TINY:
        return NotImplemented
    sequences = zip(*(t.split_with_sizes(packing.seqlens, dim=2) for t in (q, k, v)))
    return join([causal_attention(q, k, v, scores) for q, k, v in sequences])


@register
def delta_rule(q: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps what the backward pass needs."""
    return chunked_delta_rule(q, *args)


@register
def state_space(q: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps what the backward pass needs."""
    return chunked_state_space(q, *args)


@register
def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """The kernel for CPUs takes groups of heads in any case."""
    if not scores.fused:
        return NotImplemented
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale, enable_gqa=True)


@register
def empty_cache(k: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
    """Attention of one token to many is several times faster in float32, with the tokens of a head side by side."""
    return k.new_zeros(rows, k.size(1), slots, k.size(3), dtype=torch.float32)


@register
def padded_length(x: torch.Tensor, n: int) -> int:
    return rounded(n)


@register
def logits_at_once(x: torch.Tensor) -> int:
    return HEAD_LOGITS


@register
def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A few rows at a time, which stay in the processor's cache."""
    rows = max(1, LOGITS // logits.size(1))
    plain = kernels.cross_entropy_.__wrapped__  # type: ignore[attr-defined]
    return torch.cat([plain(part, expected) for part, expected in zip(logits.split(rows), targets.split(rows))])
