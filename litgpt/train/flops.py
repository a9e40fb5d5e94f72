"""How much of the machine a run uses: model FLOPs utilization, MFU (https://arxiv.org/abs/2204.02311).

The measure is the model's own products with its weights at `TOKENS` tokens, timed alone when the run begins. Only the
products that the method needs are counted: with the trained weights also those of their gradients, with the head only
at trained positions, and none for attention's scores or for what is computed twice.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from litgpt.methods.lora import LoRALinear
from litgpt.model import GPT
from litgpt.model.linear import linear

TOKENS = 1024
SECONDS = 1.0  # for the timing, about: of larger models only the smaller products are timed


@dataclass
class FlopCounter:
    """The products of one model and one method.

    Args:
        per_token: Operations for a token in the blocks, forward and backward.
        per_target: Operations for a trained position in the head.
        peak: Operations per second of the products alone, on one device.
    """

    per_token: float
    per_target: float
    peak: float

    @classmethod
    def of(cls, model: GPT, device: torch.device, dtype: torch.dtype) -> "FlopCounter":
        """Count and time the products of a model whose weights are trained where they require gradients."""
        per_token = sum(needed(name, module, model) for name, module in linears(model) if "lm_head" not in name)
        per_target = sum(needed(name, module, model) for name, module in linears(model) if "lm_head" in name)
        return cls(per_token, per_target, products_per_second(model, device, dtype))

    def share(self, tokens: int, targets: int, seconds: float, devices: int) -> Optional[float]:
        """The MFU of a stretch of training over all devices, from 0 to 1; None where that cannot be told."""
        at_peak = seconds * devices * self.peak
        return plausible((self.per_token * tokens + self.per_target * targets) / at_peak if at_peak else math.inf)


def plausible(mfu: float) -> Optional[float]:
    """None for more than there is: the machine was busier while the products were timed than while it trained."""
    return mfu if mfu <= 1 else None


def linears(model: GPT) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def needed(name: str, linear: nn.Linear, model: GPT) -> float:
    """Operations of one layer for a token that passes it: two per weight for the output, for the gradient of the input
    unless nothing before it is trained, and for that of a trained weight. LoRA's factors belong to their layer."""
    size = linear.in_features * linear.out_features
    parent = model.get_submodule(name.rpartition(".linear")[0]) if ".linear" in name else None
    factors = parent.lora_A.numel() + parent.lora_B.numel() if isinstance(parent, LoRALinear) else 0
    first = name.startswith("transformer.h.0.attn.qkv")
    before = (model.transformer.wte.weight, *model.get_submodule("transformer.h.0.norm_1").parameters())
    passes = 1 + (not first or any(p.requires_grad for p in before))
    weight = linear.weight
    trained = weight is not None and weight.requires_grad
    share = 1.0
    if ".experts." in name:
        share = model.config.n_expert_per_token / model.config.n_expert
    return share * 2 * (size * (passes + trained) + factors * 3)


@torch.no_grad()
def products_per_second(
    model: GPT, device: torch.device, dtype: torch.dtype, product: Callable[..., torch.Tensor] = linear
) -> float:
    """Operations per second of the model's linear layers, forward, at `TOKENS` tokens.

    Args:
        model: Of any device: the weights are others.
        product: What multiplies (n, in_features) with a weight (out_features, in_features).
    """
    shapes = Counter((linear.in_features, linear.out_features) for _, linear in linears(model))
    operations, seconds, began = 0.0, 0.0, time.perf_counter()
    for (n_in, n_out), count in sorted(shapes.items(), key=lambda item: item[0][0] * item[0][1]):
        x, weight = (torch.ones(n, n_in, device=device, dtype=dtype) for n in (TOKENS, n_out))
        took = min(timed(product, x, weight, device) for _ in range(6))  # the best: others may be at work
        operations += 2 * TOKENS * n_in * n_out * count
        seconds += took * count
        if time.perf_counter() - began > SECONDS:
            break
    return operations / seconds


def timed(product: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, device: torch.device) -> float:
    began = time.perf_counter()
    product(x, weight)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
