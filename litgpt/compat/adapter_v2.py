"""LitGPT's `litgpt.adapter_v2`: a `GPT` with LLaMA-Adapter V2 for a training loop of your own."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from litgpt.compat import adapter
from litgpt.litgpt_format.config import Config as BaseConfig
from litgpt.methods.adapter import AdapterV2Linear as AdapterV2Linear
from litgpt.methods.adapter import LLaMAAdapterV2
from litgpt.methods.adapter_folder import as_lit_adapts
from litgpt.model import gpt
from litgpt.model.attention import CausalSelfAttention as CausalSelfAttention
from litgpt.model.gpt import Block as Block

TRAINED = ("adapter_scale", "adapter_bias", "norm_1", "norm_2", "ln_f")


@dataclass
class Config(adapter.Config):
    """`litgpt.Config` with the options of LLaMA-Adapter V2."""


class GPT(adapter.GPT):
    """A `litgpt.adapter.GPT` with a trainable bias and scale on every linear layer."""

    config_class: type[BaseConfig] = Config
    wraps_linear = True

    def change(self, model: gpt.GPT) -> None:
        super().change(model)
        LLaMAAdapterV2().adapt_linears(model)
        as_lit_adapts(model)
        model.requires_grad_(True)


def mark_only_adapter_v2_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the prefixes, the biases and scales of the adapter, and the norms, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter_filter(name, parameter))


def adapter_filter(key: str, value: Any) -> bool:
    """Whether an entry of a state dict, or a parameter with our name, is trained."""
    return adapter.adapter_filter(key, value) or any(part in key for part in TRAINED)
