"""LitGPT's `litgpt.adapter`: a `GPT` with LLaMA-Adapter prefixes for a training loop of your own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from litgpt.litgpt_format.config import Config as BaseConfig
from litgpt.litgpt_format.model import GPT as BaseGPT
from litgpt.litgpt_format.model import Names
from litgpt.methods.adapter import LLaMAAdapter, Prefix
from litgpt.methods.adapter_folder import as_lit_adapts
from litgpt.model import gpt
from litgpt.model.attention import CausalSelfAttention as CausalSelfAttention
from litgpt.model.gpt import Block as Block

PREFIX = {"embedding": "adapter_wte.weight", "gate": "gating_factor"}  # our names below `prefix`, and LitGPT's


@dataclass
class Config(BaseConfig):
    """`litgpt.Config` with the options of LLaMA-Adapter."""

    adapter_prompt_length: int = 10
    adapter_start_layer: int = 2  # the first layer with a prefix


class GPT(BaseGPT):
    """A `litgpt.GPT` with a prefix in every layer from `adapter_start_layer` on."""

    config_class: type[BaseConfig] = Config
    config: Config

    def change(self, model: gpt.GPT) -> None:
        if self.config.adapter_start_layer < self.config.n_layer:
            LLaMAAdapter(self.config.adapter_prompt_length, self.config.adapter_start_layer).apply(model)
            as_lit_adapts(model)
            model.requires_grad_(True)

    def lit_names(self, path: str, module: nn.Module, leaf: str, parameter: torch.Tensor) -> Names:
        if not isinstance(module, Prefix):
            return super().lit_names(path, module, leaf, parameter)
        shape = (1, 1, len(parameter), 1) if leaf == "gate" else None
        return Names(f"{path}.{leaf}", [path.removesuffix("prefix") + PREFIX[leaf]], [len(parameter)], shape)


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the prefixes and their gates, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter_filter(name, parameter))


def adapter_filter(key: str, value: Any) -> bool:
    """Whether an entry of a state dict, or a parameter with our name, belongs to the adapter."""
    return any(part in key for part in ("adapter_wte", "gating_factor", ".prefix."))
