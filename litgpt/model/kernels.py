"""Operations of the model that some types of device have a faster version of.

Each function below, and in `attention_kernels`, is plain torch: what a GPU runs. `kernels_cpu` registers the faster
versions for a CPU.
With LITGPT_CPU_KERNELS=0 in the environment a CPU runs the plain ones too.

Shapes: n tokens, V vocabulary.
"""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Optional, TypeVar

import torch
from torch.nn import functional as F

from litgpt.model import rematerialize
from litgpt.model.devices import autocast_dtype
from litgpt.model.sharded import is_sharded

Function = TypeVar("Function", bound=Callable)
enabled = os.environ.get("LITGPT_CPU_KERNELS") != "0"
FASTER: dict[str, dict[str, Callable]] = {}  # by operation, then by device type
is_compiling = torch.compiler.is_compiling
HEAD_LOGITS = 2**27  # logits that the loss computes at once: few chunks, 1.4 GB with the copies in float32


def operation(plain: Function) -> Function:
    """A decorator: calls the faster version for the device of the first argument, if there is one. The compiler always
    sees the plain version."""
    versions = FASTER.setdefault(plain.__name__, {})

    @functools.wraps(plain)
    def run(x: torch.Tensor, *args: Any) -> Any:
        faster = versions.get(x.device.type) if enabled else None
        if faster is not None and not is_compiling():
            result = faster(x, *args)
            if result is not NotImplemented:
                return result
        return plain(x, *args)

    return run  # type: ignore[return-value]


def register(device_type: str) -> Callable[[Function], Function]:
    """A decorator: registers a function as the faster version of the operation that has its name. It returns
    `NotImplemented` for arguments that the plain version handles as fast."""

    def add(function: Function) -> Function:
        FASTER[function.__name__][device_type] = function
        return function

    return add


@operation
def remat(x: torch.Tensor, function: Callable[..., torch.Tensor], *others: Any) -> torch.Tensor:
    """`function(x, *others)`, which the backward pass computes again instead of keeping it. The function must be cheap
    and deterministic, and nothing may write to its inputs afterwards."""
    return rematerialize.run(x, function, *others)


@operation
def saved_tensors(x: torch.Tensor) -> AbstractContextManager:
    """How blocks keep what the backward pass needs; `x` is their input."""
    return rematerialize.rematerialization()


@operation
def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.linear`: x (..., in_features) times weight (out_features, in_features), plus bias."""
    if not is_compiling() and rematerialize.recipes is not None:
        x, weight = autocasted(x), autocasted(weight)  # which autocast would keep, all trained weights among them
    return F.linear(x, weight, bias)


def autocasted(x: torch.Tensor) -> torch.Tensor:
    """An input or a weight of a matmul in the dtype that autocast computes it in."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None else remat(x, torch.Tensor.to, dtype)


@operation
def prepacked(weight: torch.Tensor) -> Optional[torch.Tensor]:
    """The weight in the layout that the kernels for inference read; None to keep it as it is."""
    return None


@operation
def prepacked_4bit(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """The same for a 4-bit weight and the state that bitsandbytes has for it."""
    return weight, state


@operation
def stacked(weight: torch.Tensor, *others: torch.Tensor) -> Optional[torch.Tensor]:
    """Weights (out_features, in_features) as one tensor for `F.grouped_mm`; None if there is no kernel for them."""
    weights = [weight, *others]
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape)
    supported = weight.dtype == torch.bfloat16 or not weight.is_meta
    if is_sharded(weight) or not aligned or not supported or not hasattr(F, "grouped_mm"):
        return None
    return torch.stack(weights)


@operation
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, upcast: bool = False) -> torch.Tensor:
    """`F.rms_norm` over the last dimension; with `upcast` computed in float32 and returned in the dtype of `x`."""
    if upcast or weight.dtype != x.dtype:  # the kernel takes one dtype
        return F.rms_norm(remat(x, torch.Tensor.float), weight.shape, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


@operation
def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """`F.dropout`, without a mask that is kept: the seed of the mask draws it again in the backward pass."""
    if is_compiling():
        return F.dropout(x, p)
    return remat(x, Dropped.apply, p, int(torch.randint(2**62, (), device="cpu")))


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        ctx.p, ctx.seed = p, seed
        return Dropped.mask(x, p, seed).mul_(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return Dropped.mask(grads[0], ctx.p, ctx.seed).mul_(grads[0]), None, None

    @staticmethod
    def mask(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        """0 or 1 / (1 - p), in the shape and dtype of `x`."""
        generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
        return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


@operation
def empty_cache(k: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
    """A cache for keys or values (1, g, T, hs): (rows, g, slots, hs), in memory order (rows, slots, g, hs). All zeros,
    since attention multiplies masked values by 0, which does not remove a NaN."""
    return k.new_zeros(rows, slots, k.size(1), k.size(3)).transpose(1, 2)


@operation
def padded_length(x: torch.Tensor, n: int) -> int:
    """The number of tokens that a batch of `n` tokens is padded to."""
    return n


@operation
def logits_at_once(x: torch.Tensor) -> int:
    """The number of logits of hidden states like these that the loss holds in memory at once."""
    return HEAD_LOGITS


@operation
def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row, (n,), in float32. `logits` (n, V) are overwritten with the gradient of the sum."""
    logits_32 = logits.float()
    own, largest = logits_32.gather(1, targets[:, None]), logits_32.amax(1, keepdim=True)
    p = logits_32.softmax(1)
    losses = (largest - p.amax(1, keepdim=True).log() - own)[:, 0]  # the largest probability is exp(0) / sum
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
    logits.copy_(p)
    return losses
