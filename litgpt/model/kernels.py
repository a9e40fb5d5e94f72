"""Operations of the model that some types of device have a faster version of.

Each function below is plain torch: what a GPU runs. `litgpt.model.kernels_cpu` registers the faster versions for a CPU.
With LITGPT_CPU_KERNELS=0 in the environment a CPU runs the plain ones too.

Shapes: B rows, T tokens, n query heads, g key-value heads, hs head size.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, Optional, TypeVar

import torch
from torch.nn import functional as F

from litgpt.model.chunked_attention import CausalAttention, chunk_size

Function = TypeVar("Function", bound=Callable)
enabled = os.environ.get("LITGPT_CPU_KERNELS") != "0"
FASTER: dict[str, dict[str, Callable]] = {}  # by operation, then by device type
is_compiling = torch.compiler.is_compiling
HEAD_LOGITS = 2**27  # logits that the loss computes at once: few chunks, 1.4 GB with the copies in float32
SCORES = 2**26  # attention scores of all heads that are computed at once: a GPU prefers few, large matmuls


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
def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.linear`: x (..., in_features) times weight (out_features, in_features), plus bias."""
    return F.linear(x, weight, bias)


@operation
def prepacked(weight: torch.Tensor) -> Optional[torch.Tensor]:
    """The weight in the layout that the kernels for inference read; None to keep it as it is."""
    return None


@operation
def prepacked_4bit(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """The same for a 4-bit weight and the state that bitsandbytes has for it."""
    return weight, state


@operation
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, upcast: bool = False) -> torch.Tensor:
    """`F.rms_norm` over the last dimension; with `upcast` computed in float32 and returned in the dtype of `x`."""
    if upcast:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


@operation
def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    return F.dropout(x, p)


@operation
def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: Optional[float]
) -> torch.Tensor:
    """Causal attention of a sequence to itself. `q` and the result are (B, n, T, hs), `k` and `v` (B, g, T, hs)."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return CausalAttention.apply(q.to(v.dtype), k.to(v.dtype), v, scale, softcap, chunk_size(q, SCORES))


@operation
def cache_dtype(k: torch.Tensor) -> torch.dtype:
    """The dtype in which keys like these are cached."""
    return k.dtype


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
    """The summed cross-entropy, computed in float32; `logits` (n, V) are overwritten with their gradient."""
    logits_32 = logits.float()
    own, largest = logits_32.gather(1, targets[:, None]), logits_32.amax(1, keepdim=True)
    p = logits_32.softmax(1)
    total = (largest - p.amax(1, keepdim=True).log() - own).sum()  # the largest probability is exp(0) / sum
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
    logits.copy_(p)
    return total
