"""Utilization of the device: the matrix multiplications that training needs, relative to what the device can do.

That is the hardware's peak where it is known (MFU, https://arxiv.org/abs/2204.02311). Elsewhere it is the throughput of
the model's own linear layers at `TOKENS` tokens, timed at start (GEMM utilization). Only necessary operations count:
gradients of weights only where they are trained, the head only at target positions, and neither attention scores nor
recomputation.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from litgpt.methods.lora import LoRALinear
from litgpt.model.gpt import GPT
from litgpt.model.linear import linear
from litgpt.train.peaks import peak_flops

TOKENS = 1024
SECONDS = 1.0  # approximate limit for the timing; of large models only the smaller layers are timed


@dataclass
class FlopCounter:
    """The FLOPs of one model and one method."""

    per_token: float  # in the blocks, forward and backward
    per_target: float  # per target position in the head
    peak: float  # per second, of the matrix multiplications alone on one device
    name: str = "GEMM utilization"  # what the share is called

    @classmethod
    def of(cls, model: GPT, device: torch.device, dtype: torch.dtype) -> "FlopCounter":
        """Count the matrix multiplications of a model; weights that require gradients are trained. Time them if the
        peak of the device is unknown."""
        flops = {name: flops_per_token(name, module, model) for name, module in linears(model)}
        per_target = sum(n for name, n in flops.items() if "lm_head" in name)
        per_token = sum(n for name, n in flops.items() if "lm_head" not in name)
        if (peak := peak_flops(device, dtype)) is not None:
            return cls(per_token, per_target, peak, "MFU")
        return cls(per_token, per_target, gemm_throughput(model, device, dtype))

    def share(self, tokens: int, targets: int, seconds: float, devices: int) -> Optional[float]:
        """The utilization over all devices, from 0 to 1; None if it cannot be measured."""
        at_peak = seconds * devices * self.peak
        return plausible((self.per_token * tokens + self.per_target * targets) / at_peak if at_peak else math.inf)


def plausible(utilization: float) -> Optional[float]:
    """None for more than 1: the machine was busier during the timing than during the training."""
    return utilization if utilization <= 1 else None


def linears(model: GPT) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def flops_per_token(name: str, linear: nn.Linear, model: GPT) -> float:
    """FLOPs of one layer: two per weight for the output, two for the gradient of the input unless nothing before it is
    trained, and two for the gradient of a trained weight. LoRA's factors belong to their layer."""
    size = linear.in_features * linear.out_features
    parent = model.get_submodule(name.rpartition(".linear")[0]) if ".linear" in name else None
    factors = parent.lora_A.numel() + parent.lora_B.numel() if isinstance(parent, LoRALinear) else 0
    first = re.match(r"transformer\.h\.0\.attn\.(qkv|q_proj|q_a_proj|kv_a_proj|in_)", name)
    before = (model.transformer.wte.weight, *model.get_submodule("transformer.h.0.norm_1").parameters())
    passes = 1 + (not first or any(p.requires_grad for p in before))
    trained = linear.weight is not None and linear.weight.requires_grad
    return used_share(name, model) * 2 * (size * (passes + trained) + factors * 3)


def used_share(name: str, model: GPT) -> float:
    """The share of tokens that go through a layer: of an expert, those that choose it."""
    return model.config.n_expert_per_token / model.config.n_expert if ".experts." in name else 1.0


@torch.no_grad()
def gemm_throughput(
    model: GPT, device: torch.device, dtype: torch.dtype, matmul: Callable[..., torch.Tensor] = linear
) -> float:
    """FLOPs per second of the forward pass of the model's linear layers at `TOKENS` tokens, of which only the shapes
    are used. `matmul` multiplies (n, in_features) by a weight (out_features, in_features)."""
    shapes = Counter((linear.in_features, linear.out_features) for _, linear in linears(model))
    operations, seconds, began = 0.0, 0.0, time.perf_counter()
    for (n_in, n_out), count in sorted(shapes.items(), key=lambda item: item[0][0] * item[0][1]):
        x, weight = (torch.ones(n, n_in, device=device, dtype=dtype) for n in (TOKENS, n_out))
        took = min(timed(matmul, x, weight, device) for _ in range(6))  # other processes may disturb some
        operations += 2 * TOKENS * n_in * n_out * count
        seconds += took * count
        if time.perf_counter() - began > SECONDS:
            break
    return operations / seconds


def timed(matmul: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor, device: torch.device) -> float:
    began = time.perf_counter()
    matmul(x, weight)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
