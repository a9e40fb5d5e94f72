"""LitGPT's `litgpt.lora`: a `GPT` with LoRA layers for a training loop of your own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.litgpt_format.config import Config as BaseConfig
from litgpt.litgpt_format.model import GPT as BaseGPT
from litgpt.methods import lora as inner
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model import gpt
from litgpt.model.attention import CausalSelfAttention as CausalSelfAttention
from litgpt.model.gpt import Block as Block
from litgpt.model.linear import Linear
from litgpt.model.mlp import Router


class NoSuchBias(UserError, NotImplementedError):
    """The choice of trainable biases does not exist."""


@dataclass
class Config(BaseConfig):
    """`litgpt.Config` with the options of LoRA."""

    lora_r: int = 0  # rank of the updates; without LoRA if 0
    lora_alpha: int = 1  # the updates are multiplied by lora_alpha / lora_r
    lora_dropout: float = 0.0
    lora_query: bool = False
    lora_key: bool = False
    lora_value: bool = False
    lora_projection: bool = False
    lora_mlp: bool = False
    lora_head: bool = False


class LoRALinear(inner.LoRALinear):
    """A linear layer with a low-rank update, which can be merged into its weight.

    Attributes:
        merged: Whether the update is part of the weight.
    """

    merged = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        lora = inner.LoRA(r=max(r, 1), alpha=lora_alpha, dropout=lora_dropout)
        super().__init__(Linear(in_features, out_features, **kwargs), lora)
        if r == 0:
            del self.lora_A, self.lora_B

    @classmethod
    def wrap(cls, linear: Any, lora: inner.LoRA, adapted: Sequence[bool]) -> "LoRALinear":
        """An existing layer with an update of those of its blocks of rows that are adapted."""
        layer = cls.__new__(cls)
        inner.LoRALinear.__init__(layer, linear, lora, adapted)
        return layer

    @property
    def r(self) -> int:
        return self.lora.r if hasattr(self, "lora_A") else 0

    @property
    def lora_alpha(self) -> float:
        return self.lora.alpha

    @property
    def scaling(self) -> float:
        return self.lora.scaling

    @property
    def lora_dropout(self) -> nn.Module:
        return self.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if self.merged or not self.r else super().forward(x)

    @torch.no_grad()
    def get_lora_AB(self) -> torch.Tensor:
        """What the update adds to the weight, (out_features, in_features)."""
        update = self.lora_B.new_zeros(self.linear.out_features, self.linear.in_features)
        for at, (_, a, b) in zip(self.rows, self.blocks()):
            update[at] = self.lora.scaling * (b @ a)
        return update

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, once."""
        if isinstance(self.linear, QuantizedLinear):
            raise UserError("A quantized layer cannot be merged. Merge with `litgpt merge_lora` instead.")
        if self.r and not self.merged:
            weight = self.linear.weight
            weight.copy_(weight.float() + self.get_lora_AB())
            self.merged = True


class LoRAQKVLinear(LoRALinear):
    """A fused projection of queries, keys and values, of which any may have an update. `enable_lora` says which, in
    this order, or is one value for all."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        head_size: int,
        n_head: int,
        n_query_groups: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        enable_lora: Union[bool, Sequence[bool]] = False,
        **kwargs: Any,
    ) -> None:
        adapted = [enable_lora] * 3 if isinstance(enable_lora, bool) else list(enable_lora)
        linear = Linear(in_features, out_features, **kwargs)
        linear.parts = tuple(n * head_size for n in (n_head, n_query_groups, n_query_groups))  # type: ignore[assignment]
        is_on = r > 0 and any(adapted)
        lora = inner.LoRA(r=max(r, 1), alpha=lora_alpha, dropout=lora_dropout)
        inner.LoRALinear.__init__(self, linear, lora, adapted if is_on else [True] * 3)
        if not is_on:
            del self.lora_A, self.lora_B

    @property
    def enable_lora(self) -> tuple[bool, ...]:
        return self.adapted


class LoRA(inner.LoRA):
    """LoRA with layers that can be merged. As in LitGPT, the routers of experts are adapted with the MLPs."""

    def wrap(self, linear: nn.Linear, adapted: Sequence[bool]) -> inner.LoRALinear:
        return (LoRAQKVLinear if len(adapted) == 3 else LoRALinear).wrap(linear, self, adapted)

    def apply(self, model: gpt.GPT) -> None:
        super().apply(model)
        if self.mlp:
            for name, router in [(n, m) for n, m in model.named_modules() if type(m) is Router]:
                model.set_submodule(name, LoRALinear.wrap(router, self, [True]))


class GPT(BaseGPT):
    """A `litgpt.GPT` whose linear layers have the updates that its config asks for."""

    config_class = Config
    wraps_linear = True
    config: Config

    def change(self, model: gpt.GPT) -> None:
        c = self.config
        chosen = {name: getattr(c, f"lora_{name}") for name in inner.TARGETS}
        if c.lora_r > 0 and any(chosen.values()):
            LoRA(r=c.lora_r, alpha=c.lora_alpha, dropout=c.lora_dropout, **chosen).apply(model)
            model.requires_grad_(True)


LoRALayer = LoRALinear  # LitGPT's base class of its layers


def mark_only_lora_as_trainable(model: nn.Module, bias: Literal["none", "all", "lora_only"] = "none") -> None:
    """Freeze everything but the updates, in place.

    Args:
        model: A `GPT`, or any module with LoRA layers.
        bias: Biases to train too: none, all, or those of LoRA layers.
    """
    if bias not in ("none", "all", "lora_only"):
        raise NoSuchBias(f"bias {bias!r} is not supported. Choose from none, all, lora_only.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lora_filter(name, parameter) or (bias == "all" and "bias" in name))
    if bias == "lora_only":
        for layer in inner.lora_layers(model).values():
            if layer.linear.bias is not None:
                layer.linear.bias.requires_grad_(True)


def lora_filter(key: str, value: Any) -> bool:
    """Whether an entry of a state dict belongs to an update."""
    return "lora_" in key


def merge_lora_weights(model: nn.Module) -> None:
    """Add all updates to the weights, in place. The updates stay in the state dict and have no effect any more."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge()
