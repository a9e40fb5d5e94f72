"""How much memory a model keeps for its backward pass, on the meta device.

The meta device decomposes what a GPU does in one kernel, so stand-ins keep what those kernels keep: a norm its input
and a float32 number per row; attention q, k, v, its output and a float32 number per row and head.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Optional, Union
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.methods.lora import LoRA
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model import attention_kernels
from litgpt.model.blocks import Offload, recompute
from litgpt.model.config import Config
from litgpt.model.gpt import GPT


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Attention(torch.autograd.Function):
    """`q` is (..., n, T, hs), `k` and `v` (..., g, T, hs), in any order of the dimensions before the last."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(q)  # in the memory order of q, as the kernels for GPUs
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return Norm.apply(x, weight)


def one_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return Attention.apply(q, k, v)


class OnHost(Offload):
    """Offloads tensors of the meta device to nowhere."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, x: torch.Tensor) -> None:
        self.sizes.clear()
        super().__init__(x)

    def pack(self, x: torch.Tensor) -> Any:
        self.sizes.append(x.numel() * x.element_size())
        return x.size(), x.dtype

    def unpack(self, kept: Any) -> torch.Tensor:
        return torch.empty(kept[0], dtype=kept[1], device="meta")


@contextmanager
def fused_kernels() -> Iterator[None]:
    """On the meta device, keep what the kernels of a GPU keep."""
    with (
        mock.patch.object(F, "rms_norm", rms_norm),
        mock.patch.object(F, "scaled_dot_product_attention", one_attention),
        mock.patch.object(attention_kernels, "has_varlen", lambda x: True),
        mock.patch.object(attention_kernels, "varlen", lambda: one_attention),
    ):
        yield


class Storages(TorchDispatchMode):
    """The bytes of the storages that were made under this mode and are alive. `others` do not count."""

    def __init__(self, *others: torch.Tensor) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.others = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.others:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None).atexit = False
        return out

    @property
    def total(self) -> int:
        return sum(self.alive.values())


def kept(
    config: Config, method: Optional[LoRA], scheme: Optional[str], checkpointing: Union[bool, str], tokens: int
) -> tuple[int, int]:
    """Bytes that are alive between the forward and the backward pass of the blocks, without weights, in bfloat16: on
    the device and in the memory of the host. `checkpointing` is a value of --train.activation_checkpointing."""
    with torch.device("meta"):
        model = GPT(config).to(torch.bfloat16)
        if scheme is not None:
            quantize(model, scheme, torch.device("cpu"))
        if method is not None:
            method.apply(model)
            model.transformer.wte.requires_grad_(True)  # as if a layer before the first one were trained
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                for part, rows in enumerate(layer.parts):
                    layer.store(part, torch.empty(rows, layer.in_features, dtype=torch.bfloat16))
        if checkpointing:
            recompute(model, offload=checkpointing == "offload")
    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    if checkpointing == "offload":
        model.saved_tensors = OnHost
    OnHost.sizes.clear()
    quantized = [weight for m in model.modules() if isinstance(m, QuantizedLinear) for weight, _ in m.stored]
    with fused_kernels(), Storages(*model.parameters(), *quantized, ids) as storages:
        hidden = model.hidden(ids, [tokens // 2, tokens // 2])
        total, host = storages.total, sum(OnHost.sizes)
        hidden.sum().backward()
    return total, host
