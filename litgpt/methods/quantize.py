"""Linear layers with frozen weights in 4 or 8 bits, by bitsandbytes, on CUDA and on CPUs; or experts in MXFP4.

4 bits: https://arxiv.org/abs/2305.14314; with `-dq` the scales are quantized too. 8 bits:
https://arxiv.org/abs/2208.07339. MXFP4, in which gpt-oss is released, keeps what such a folder has.
"""

import copy
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.errors import UserError, require
from litgpt.families import mxfp4
from litgpt.model.gpt import GPT
from litgpt.model.kernels import autocasted, prepacked_4bit
from litgpt.model.linear import PartwiseLinear, in_rows
from litgpt.model.sharded import full_tensor

QuantizeName = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", "bnb.int8-training", "mxfp4"]
INT8 = ("bnb.int8", "bnb.int8-training")  # two names for the same scheme
MXFP4 = "mxfp4"
OUTLIER = 6.0  # inputs above this are not rounded, as in the paper on 8 bits


class QuantizedLinear(PartwiseLinear):
    """A frozen linear layer that is quantized part by part with `store`. Each Hugging Face tensor has its own scales,
    even if several form one layer, so that the result equals that of other programs. `weight` is a meta tensor until
    all parts are stored, then None. The layer to replace is on the meta device, `scheme` a `QuantizeName`."""

    weight: Any

    def __init__(self, linear: nn.Linear, scheme: str) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.requires_grad_(False)
        self.scheme = scheme
        self.parts = getattr(linear, "parts", (linear.out_features,))
        self.stored: list[Any] = [None] * len(self.parts)  # per part: the quantized weight and its state

    def begin(self, n_parts: int) -> None:
        self.stored = [None] * n_parts

    def store(self, part: int, weight: torch.Tensor) -> None:
        """Quantize one part: a floating-point tensor (rows, in_features) on the device where it is to stay."""
        if self.scheme == MXFP4:
            self.stored[part] = mxfp4.quantized(weight)
        elif self.scheme in INT8:
            weight_8bit, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.to(torch.float16))
            state = bitsandbytes().MatmulLtState(CB=weight_8bit, SCB=scales)
            state.has_fp16_weights, state.threshold = False, OUTLIER
            self.stored[part] = weight_8bit, state
        else:
            kind, _, double = self.scheme.removeprefix("bnb.").partition("-")
            self.stored[part] = bitsandbytes().functional.quantize_4bit(
                weight.contiguous(), compress_statistics=double == "dq", quant_type=kind
            )
        if all(self.stored):
            self.weight = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Called by `.to`, `.half` and similar methods. Quantized weights and scales move to another device but keep
        their dtypes; only the dtype of the dequantized weight changes."""
        super()._apply(fn, recurse)
        for part, (weight, state) in ((part, both) for part, both in enumerate(self.stored) if both is not None):
            if self.scheme == MXFP4:
                self.stored[part] = moved_bits(weight, fn), moved_bits(state, fn)
                continue
            moved = moved_state(state, fn)
            if isinstance(getattr(state, "dtype", None), torch.dtype) and not in_tiles(state):
                moved.dtype = fn(torch.empty(0, dtype=state.dtype, device=weight.device)).dtype
            self.stored[part] = (moved.CB if self.scheme in INT8 else moved_bits(weight, fn)), moved
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = autocasted(x.reshape(-1, x.size(-1)))  # autocast itself does not know bitsandbytes
        y = [self.matmul(flat, *stored) for stored in self.stored]
        joined = y[0] if len(y) == 1 else torch.cat(y, dim=-1)
        joined = joined if self.bias is None else joined + self.bias.to(joined.dtype)
        # Not a view: updates are added in place. Autograd copies a changed view in the backward pass, and forbids
        # changing one from within an autograd function, as bitsandbytes returns for 8 bits on CUDA.
        return torch.ops.aten._unsafe_view(joined, [*x.shape[:-1], joined.size(-1)])

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, state: Any) -> torch.Tensor:
        if self.scheme == MXFP4:
            return MXFP4Matmul.apply(x, weight, state)
        if self.scheme in INT8:
            state.is_training = self.training
            return bitsandbytes().matmul(x, weight, state=state)
        return bitsandbytes().matmul_4bit(x, weight, state)

    def prepack(self, shared: bool = False) -> None:
        if self.scheme not in (*INT8, MXFP4):
            self.stored = [both if in_tiles(both[1]) else prepacked_4bit(*both) for both in self.stored]

    def undo_prepack(self) -> bool:
        """Does nothing: no code reads or trains a quantized weight after inference."""
        return False

    def dequantized(self) -> torch.Tensor:
        """(out_features, in_features)"""
        if self.scheme == MXFP4:
            return torch.cat([mxfp4.dequantized(*both) for both in self.stored])
        assert self.scheme in INT8 or not any(in_tiles(state) for _, state in self.stored)
        if self.scheme in INT8:
            return torch.cat([weight.float() * (state.SCB[:, None] / 127) for weight, state in self.stored])
        functional = bitsandbytes().functional
        return torch.cat([functional.dequantize_4bit(weight, state) for weight, state in self.stored])


class MXFP4Matmul(torch.autograd.Function):
    """Multiplies by a weight that is dequantized for it, also in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*weight)
        return F.linear(x, mxfp4.dequantized(*weight).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return grads[0] @ mxfp4.dequantized(*ctx.saved_tensors).to(grads[0].dtype), None, None


def moved_state(state: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of bitsandbytes' state of a weight, or of its scales, with `fn` applied to its tensors. Dtypes stay."""
    moved = copy.copy(state)
    for name, value in vars(state).items():
        if torch.is_tensor(value):
            setattr(moved, name, moved_bits(value, fn))
        elif type(value) is type(state):
            setattr(moved, name, moved_state(value, fn))
    return moved


def moved_bits(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`fn` of a tensor whose dtype it must not change. It does not change that of integers."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return fn(tensor.view(size)).view(tensor.dtype)


def in_tiles(state: Any) -> bool:
    """Whether a 4-bit weight is prepacked."""
    return getattr(state, "packing_format_for_cpu", False)


def full_weight(linear: nn.Linear) -> torch.Tensor:
    """The weight of a layer, (out_features, in_features): dequantized, unsharded, in rows."""
    return linear.dequantized() if isinstance(linear, QuantizedLinear) else in_rows(full_tensor(linear.weight))


def quantize(model: GPT, scheme: str, device: torch.device) -> None:
    """Replace the linear layers of the blocks with `QuantizedLinear`, in place, before the weights are read.
    Embeddings, norms and the head stay as they are, and with MXFP4 all but the experts. Raises `UserError` if the
    device does not support it, or bitsandbytes is missing."""
    linears = {name: m for name, m in model.transformer.h.named_modules() if isinstance(m, nn.Linear)}
    if scheme == MXFP4:
        linears = {name: m for name, m in linears.items() if ".experts." in name}
        if not linears or any(linear.in_features % mxfp4.SIZE for linear in linears.values()):
            raise UserError(
                f"--quantize {scheme} is for experts with rows of a multiple of {mxfp4.SIZE} numbers, as gpt-oss has. "
                f"This model, {model.config.model_type}, has none."
            )
    elif device.type not in ("cpu", "cuda"):
        raise UserError(f"--quantize {scheme} does not support {device.type}. Use cuda or cpu.")
    else:
        bitsandbytes()
    for name, linear in linears.items():
        model.transformer.h.set_submodule(name, QuantizedLinear(linear, scheme))


@cache
def bitsandbytes() -> ModuleType:
    """The library without its messages at import and for each matmul. Raises `UserError` if it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return require("bitsandbytes", "quantize")
