"""Products with weights, by the faster of the two libraries that torch has for them on a CPU.

Shapes: n tokens.
"""

import math
from functools import cache
from typing import Any, Optional

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROUND = 32  # the least that `rounded` rounds to
LARGE = 2**24  # multiplications from which on they pay
SMALL = 2**19  # the same for fewer tokens than ROUND
TEXTS = 16  # that packed weights are laid out for: a layout for single ones is slower, also with single ones
PACKED = {torch.float32: 2**18, torch.bfloat16: 2**14}  # numbers of a weight from which on `pack` pays


def rounded(n: int) -> int:
    """The next round number of tokens: of `ROUND`, or a sixteenth of the power of two above it.

    oneDNN makes kernels for each number that it meets, and keeps half a megabyte of each: few numbers, few kernels.
    """
    step = max(ROUND, 2 ** ((n - 1).bit_length() - 4)) if n else ROUND
    return -(-n // step) * step


class Linear(nn.Linear):
    """`nn.Linear`, faster in float32 on a CPU.

    Attributes:
        read: Whether something reads the weight itself, as DoRA does.
    """

    read = False

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # drawing there imports torch's compiler, which takes a second
            super().reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def pack(self, shared: bool = False) -> None:
        """Lay out the weight as oneDNN's kernels read it, where that pays.

        Args:
            shared: Whether another layer has the same weight, which then stays as it is there.
        """
        weight = self.weight
        pays = weight.numel() >= PACKED.get(weight.dtype, math.inf)
        if pays and weight.is_cpu and not (weight.is_mkldnn or weight.requires_grad):
            self.put(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TEXTS), shared)

    @torch.no_grad()
    def unpack(self) -> bool:
        """Undo `pack`; whether there was something to undo."""
        packed = bool(self.weight.is_mkldnn)
        if packed:
            self.put(plain(self.weight))
        return packed

    def put(self, weight: torch.Tensor, shared: bool = False) -> None:
        """Give the weight other contents. Unless it is shared it stays the same object, which an optimizer may hold."""
        new = nn.Parameter(weight, self.weight.requires_grad)
        if shared:
            self.weight = new
        else:
            torch.utils.swap_tensors(self.weight, new)


class PartwiseLinear(Linear):
    """A linear layer that is filled one part after the other, each with the rows of one Hugging Face tensor, and that
    need not hold them as its `weight`."""

    def begin(self, n_parts: int) -> None:
        """Make room for so many parts."""
        raise NotImplementedError

    def store(self, part: int, weight: torch.Tensor) -> None:
        """Take one part, a floating-point tensor (rows, in_features) on the device where it is to stay."""
        raise NotImplementedError


class Embedding(nn.Embedding):
    """`nn.Embedding`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.linear`: x (..., in_features) times weight (out_features, in_features), plus bias.

    torch gives float32 products to MKL, which uses half of what an AMD processor with AVX-512 can do. oneDNN, which
    torch has for bfloat16, uses all of it on any make; the sums are of the same precision, in another order.
    """
    n = x.shape[:-1].numel()
    if weight.is_mkldnn:
        assert not (x.requires_grad and torch.is_grad_enabled()), "a packed weight gives no gradient: unpack the model"
    elif (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or not (x.is_cpu and x.dtype == weight.dtype == torch.float32 and onednn())
    ):
        return F.linear(x, weight, bias)
    elif torch.is_grad_enabled():
        if n % ROUND or n * weight.numel() < LARGE:
            return F.linear(x, weight, bias)
        y = _Product.apply(x, weight)
        return y if bias is None else y + bias
    elif n * weight.numel() < (SMALL if n < ROUND else LARGE):
        return F.linear(x, weight, bias)
    if n < ROUND or n % ROUND == 0:
        return product(x, weight, bias)
    parts = x.flatten(0, -2).split([n - n % ROUND, n % ROUND])
    return torch.cat([product(part, weight, bias) for part in parts]).unflatten(0, x.shape[:-1])


@cache
def onednn() -> bool:
    """Whether this torch and this processor can do it."""
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x (..., in_features) times the transposed weight (out_features, in_features), without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Lay out the weights of a model that only answers as the kernels for a few tokens read them, in place.

    On a CPU a token's products then take half of the time in bfloat16, and a third in float32, since a plain weight is
    laid out anew for each token. Only products without gradients take such a weight; `unpack` makes it plain again. A
    head that is tied to the embedding gets a copy. Layers whose weight something else reads stay as they are.
    """
    if onednn():
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for layer in linears(model):
            if not layer.read:
                layer.pack(shared=id(layer.weight) in tables)


def unpack(model: nn.Module) -> bool:
    """Undo `pack`, quantized layers excepted; whether there was something to undo. A head that was tied to the
    embedding is not tied again."""
    return sum(layer.unpack() for layer in linears(model)) > 0


def linears(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def plain(weight: torch.Tensor) -> torch.Tensor:
    """A weight in rows, whether it is packed or not."""
    return weight.to_dense() if weight.is_mkldnn else weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        # no view: what is changed in place later, as LoRA and the loss do, would be copied in the backward pass
        return torch.ops.aten._unsafe_view(product(x.flatten(0, -2), weight), [*x.shape[:-1], len(weight)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        grad, grad_weight = grads[0].flatten(0, -2), None
        grad_x = product(grad, weight.t()).view(*grads[0].shape[:-1], -1) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:  # the first factor is copied: the narrower one
            wide, narrow = grad.t(), x.flatten(0, -2).t()
            grad_weight = product(narrow, wide).t() if len(wide) > len(narrow) else product(wide, narrow)
        return grad_x, grad_weight
