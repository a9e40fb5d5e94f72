"""The product of a linear layer."""

from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

SMALL = 2**19  # multiplications below which a call of oneDNN costs more than it gains
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """What `F.linear` gives: x W' + b.

    In float32 on a CPU torch leaves the product to MKL, which does not use the widest registers of other makers'
    processors: there oneDNN, which comes with torch too, takes half of the time, and less for a single row.

    Args:
        x: (..., in_features)
        weight: (out_features, in_features)
        bias: (out_features,)

    Returns:
        (..., out_features)
    """
    wide = ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32
    elsewhere = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if not wide or elsewhere or x.numel() * weight.size(0) < SMALL:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return OneDNNLinear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return product(x, weight, bias)


def product(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The same by oneDNN, without a gradient; strides may be any."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """`product` of (n, in_features) with its gradients; none is made that is not wanted."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        grad, wanted = grads[0], ctx.needs_input_grad
        grad_x = product(grad, weight.t()) if wanted[0] else None
        grad_weight = product(grad.t(), x.t()) if wanted[1] else None
        return grad_x, grad_weight, grad.sum(0) if wanted[2] else None
