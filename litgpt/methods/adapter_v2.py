"""LLaMA-Adapter V2: the prefixes of LLaMA-Adapter, a bias and a scale on every linear layer, and trainable norms.

Trainable are the norms before and after attention and MLP, and the final norm. The norms of queries and keys and the
routers of experts stay frozen.

https://arxiv.org/abs/2304.15010
"""

from dataclasses import dataclass
from typing import ClassVar, Union

import torch
from torch import nn

from litgpt.methods.adapter import LLaMAAdapter
from litgpt.model import GPT
from litgpt.model.mlp import Router

NORMS = {"norm_1", "norm_2", "post_attention_norm", "post_mlp_norm", "ln_f"}


class AdapterV2Linear(nn.Module):
    """scale * (W x + b + bias) with a learned scale and bias, in float32."""

    def __init__(self, linear: Union[nn.Linear, Router]) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.adapter_bias = nn.Parameter(torch.empty(linear.out_features, device=device))
        self.adapter_scale = nn.Parameter(torch.empty(linear.out_features, device=device))
        if device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.adapter_bias)
        nn.init.ones_(self.adapter_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


@dataclass
class LLaMAAdapterV2(LLaMAAdapter):
    """Prefixes from `start_layer` on, and a bias, a scale and trainable norms everywhere."""

    name: ClassVar[str] = "LLaMA-Adapter V2"

    def apply(self, model: GPT) -> None:
        super().apply(model)
        for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
            model.set_submodule(name, AdapterV2Linear(linear))
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].rpartition(".")[2] in NORMS:
                parameter.requires_grad_(True)
