"""LoRA and adapters that LitGPT wrote."""

import re
from pathlib import Path

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.litgpt_format.folder import (
    ADAPTERS,
    SETTINGS,
    group_order,
    notify,
    prefix_sources,
    read_lora,
    read_pth,
    read_settings,
)
from litgpt.methods.adapter import LLaMAAdapter, Prefix, trained
from litgpt.methods.adapter_v2 import AdapterV2Linear, LLaMAAdapterV2
from litgpt.methods.deltas import Delta, to_modules
from litgpt.methods.peft_folder import AdapterSlice, LoRAFolder
from litgpt.model import GPT
from litgpt.model.attention import CausalSelfAttention
from litgpt.model.config import Config
from litgpt.model.mlp import Router


class LitLoRAFolder(LoRAFolder):
    """LitGPT's LoRA: an A and a B for each layer. Those of q, k and v are concatenated along their rows.

    Args:
        file: The `lit_model.pth.lora`. `hyperparameters.yaml` in its folder has the rank, alpha and adapted layers.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, file.parent
        settings = read_settings(self.folder)
        try:
            self.r, self.alpha = int(settings["lora_r"]), float(settings["lora_alpha"])
        except (KeyError, TypeError) as e:
            raise UserError(f"{self.folder / SETTINGS} has no usable lora_r and lora_alpha.") from e
        self.base = str(settings.get("checkpoint_dir") or "")
        self.adapted = [i for i, name in enumerate(("query", "key", "value")) if settings.get(f"lora_{name}")]
        self.shapes, self.alphas, self.highest = {}, {}, self.r
        self.dora = self.rslora = False

    def places(self, config: Config) -> dict[str, list[AdapterSlice]]:
        return {name: [AdapterSlice(name, name, len(delta.a))] for name, delta in self.deltas(config).items()}

    def deltas(self, config: Config) -> dict[str, Delta]:
        names, scale = weight_map(config), self.alpha / self.r
        deltas: dict[str, Delta] = {}
        for ours, blocks in read_lora(self.file, self.r, self.adapted, config).items():
            sizes = config.qkv_sizes if ours.endswith("attn.qkv") else [len(b) for _, b in blocks.values()]
            deltas |= to_modules(names, ours, {i: Delta(a, b, scale) for i, (a, b) in blocks.items()}, sizes)
        return deltas


class LitPrefixFolder:
    """LitGPT's LLaMA-Adapter or its second version.

    For the keys and values of its prefix, LitGPT uses other rows of the fused projection than for tokens: those for the
    order in files without `attn.qkv`. The prefix was trained with these rows, so they are used here too.

    Args:
        file: The `lit_model.pth.adapter` or `.adapter_v2`.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, file.parent
        self.base = str(read_settings(self.folder).get("checkpoint_dir") or "")
        self.weights = read_pth(file)
        prefixes = {
            int(found[1]): t
            for name, t in self.weights.items()
            if (found := re.search(r"\.h\.(\d+)\.attn\.adapter_wte\.weight$", name))
        }
        if not prefixes or any(t.dim() != 2 for t in prefixes.values()):
            raise UserError(f"{file} is not an adapter of LitGPT: it has no adapter_wte.")
        kind = LLaMAAdapterV2 if file.name == ADAPTERS[2] else LLaMAAdapter
        self.adapter = kind(len(next(iter(prefixes.values()))), min(prefixes))

    @property
    def description(self) -> str:
        return f"{self.adapter}, made by LitGPT"

    @property
    def legacy(self) -> bool:
        """Whether the file is from when there was `attn.attn`, and the prefix used the rows of tokens."""
        gates = [t for name, t in self.weights.items() if name.endswith("gating_factor")]
        return any(".attn.attn." in name for name in self.weights) or any(t.size(1) > 1 for t in gates if t.dim() == 4)

    def apply(self, model: GPT) -> None:
        """Add the adapter to a model on the meta device."""
        self.adapter.apply(model)
        config = model.config
        rows = group_order(config).argsort()
        other_rows = not self.legacy and not torch.equal(rows, torch.arange(len(rows)))
        for block in model.transformer.h:
            attention = block.attn
            assert isinstance(attention, CausalSelfAttention)
            if isinstance(attention.prefix, Prefix):
                attention.prefix.order = rows if other_rows else None
                attention.prefix.softcap = config.attention_logit_softcapping
        if other_rows:
            notify(
                f"{self.file}: the keys and values of the prefix use the rows that LitGPT uses, not those of the paper."
            )
        if isinstance(self.adapter, LLaMAAdapterV2):  # LitGPT adapts routers too
            for name, router in [(n, m) for n, m in model.named_modules() if isinstance(m, Router)]:
                model.set_submodule(name, AdapterV2Linear(router))

    @torch.no_grad()
    def load_into(self, model: GPT) -> None:
        """Fill the parameters that `apply` added. LitGPT does not train the norms after attention and MLP.

        Raises:
            UserError: names or shapes do not fit the model; all of them at once.
        """
        wrong, used = [], set()
        for name, parameter in trained(model).items():
            sources = self.sources(name, model)
            used |= set(sources)
            if missing := [n for n in sources if n not in self.weights]:
                wrong += [] if ".post_" in name else [f"{n} is missing" for n in missing]
                continue
            tensors = [self.weights[n] for n in sources]
            value = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            value = value.flatten() if name.endswith(".prefix.gate") else value
            if value.shape != parameter.shape:
                wrong.append(f"{' and '.join(sources)} {tuple(value.shape)} instead of {tuple(parameter.shape)}")
                continue
            if ".attn.attn." in sources[0]:
                value = value[group_order(model.config).argsort()]
            parameter.copy_(value)
        wrong += [f"{name} is unknown" for name in self.weights if name not in used]
        if wrong:
            raise UserError(f"The adapter in {self.file} does not fit the model: {'; '.join(wrong)}.")

    def sources(self, name: str, model: GPT) -> list[str]:
        """The tensors of the file that hold a parameter of ours."""
        path, _, leaf = name.rpartition(".")
        layer: nn.Module = model.get_submodule(path)
        return prefix_sources(self.weights, path, leaf, layer.linear if isinstance(layer, AdapterV2Linear) else layer)
