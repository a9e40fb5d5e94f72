"""Adapter folders: LoRA in PEFT's format, LLaMA-Adapter and its second version in our own, and those of LitGPT."""

import json
import re
from pathlib import Path
from typing import Any, Union

import torch
from safetensors.torch import save_file
from torch import nn

from litgpt.checkpoint.folder import opened
from litgpt.errors import UserError, nearest
from litgpt.families import weight_map
from litgpt.litgpt_format.folder import (
    ADAPTERS,
    MODEL,
    SETTINGS,
    group_order,
    has_hf_weights,
    lit_adapter_file,
    notify,
    prefix_sources,
    read_lora,
    read_pth,
    read_settings,
)
from litgpt.methods.adapter import AdapterV2Linear, LLaMAAdapter, LLaMAAdapterV2, Prefix, trained
from litgpt.methods.deltas import Delta, to_modules
from litgpt.methods.peft_folder import CONFIG, WEIGHTS, AdapterSlice, LoRAFolder, read_shapes
from litgpt.model.attention import CausalSelfAttention
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.mlp import Router
from litgpt.model.sharded import full_tensor, put
from litgpt.storage.files import is_there, read_json

KINDS = {"LITGPT_ADAPTER": LLaMAAdapter, "LITGPT_ADAPTER_V2": LLaMAAdapterV2}  # by peft_type


def write_adapter(adapter: LLaMAAdapter, model: GPT, base: str, folder: Path) -> None:
    """Write `adapter_config.json` and the trained weights. `base` is the base's repository id or absolute path."""
    fields = {
        "peft_type": next(name for name, kind in KINDS.items() if type(adapter) is kind),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "adapter_prompt_length": adapter.prompt_length,
        "adapter_start_layer": adapter.start_layer,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    weights = {name: full_tensor(p).detach().cpu().contiguous() for name, p in trained(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


class PrefixFolder:
    """A folder of LLaMA-Adapter or its second version. Raises `UserError` if the folder is damaged."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.folder = folder
        self.base = str(fields.get("base_model_name_or_path") or "")
        self.file, self.shapes = read_shapes(folder)
        try:
            length, start = int(fields["adapter_prompt_length"]), int(fields["adapter_start_layer"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder / CONFIG} has no usable adapter_prompt_length and adapter_start_layer.") from e
        self.adapter = KINDS[fields["peft_type"]](length, start)

    @property
    def description(self) -> str:
        return str(self.adapter)

    def apply(self, model: GPT) -> None:
        """Add the adapter to a model on the meta device. Raises one `UserError` for all that does not fit."""
        start, n_layer = self.adapter.start_layer, model.config.n_layer
        if start >= n_layer:
            raise UserError(
                f"{self.folder / CONFIG}: adapter_start_layer is {start}, but the model has {n_layer} layers."
            )
        self.adapter.apply(model)
        self.check_trainable(model)

    def check_trainable(self, model: GPT) -> None:
        """Raise one `UserError` for all that does not fit a model with such an adapter."""
        expected = {name: tuple(p.shape) for name, p in trained(model).items()}
        wrong = [f"{name} is missing" for name in expected if name not in self.shapes]
        for name, shape in self.shapes.items():
            if name not in expected:
                wrong.append(f"{name} is unknown")
            elif shape != expected[name]:
                wrong.append(f"{name} {shape} instead of {expected[name]}")
        if wrong:
            raise UserError(f"The adapter in {self.folder} does not fit the model: {'; '.join(wrong)}.")

    @torch.no_grad()
    def load_into(self, model: GPT) -> None:
        with opened(self.file) as f:
            for name, parameter in trained(model).items():
                put(parameter, 0, f.get_tensor(name))


class LitLoRAFolder(LoRAFolder):
    """LitGPT's LoRA, a `lit_model.pth.lora`: an A and a B for each layer. Those of q, k and v are concatenated along
    their rows. `hyperparameters.yaml` in its folder has the rank, alpha and adapted layers. Raises `UserError` if a
    file is missing or damaged."""

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
    """LitGPT's LLaMA-Adapter or its second version, a `lit_model.pth.adapter` or `.adapter_v2`. For the keys and values
    of its prefix, LitGPT uses other rows of the fused projection than for tokens: those for the order in files without
    `attn.qkv`. The prefix was trained with these rows, so they are used here too. Raises `UserError` if the file is
    damaged."""

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
        self.adapter.apply(model)
        if as_lit_adapts(model, self.legacy):
            notify(
                f"{self.file}: the keys and values of the prefix use the rows that LitGPT uses, not those of the paper."
            )

    def check_trainable(self, model: GPT) -> None:
        raise UserError(f"{self.folder} is a {self.description}, which cannot be trained further.")

    @torch.no_grad()
    def load_into(self, model: GPT) -> None:
        """Fill the parameters that `apply` added. LitGPT does not train the norms after attention and MLP. Raises one
        `UserError` for all names and shapes that do not fit the model."""
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
        path, _, leaf = name.rpartition(".")
        layer: nn.Module = model.get_submodule(path)
        return prefix_sources(self.weights, path, leaf, layer.linear if isinstance(layer, AdapterV2Linear) else layer)


def as_lit_adapts(model: GPT, legacy: bool = False) -> bool:
    """Change a model with a LLaMA-Adapter, or its second version, to what LitGPT adapts. Returns whether the prefixes
    use other rows than those of the paper; never if the adapter is `legacy`, from when there was `attn.attn`."""
    config = model.config
    rows = group_order(config).argsort()
    other_rows = not legacy and not torch.equal(rows, torch.arange(len(rows)))
    for block in model.transformer.h:
        attention = block.attn
        if isinstance(attention, CausalSelfAttention) and isinstance(attention.prefix, Prefix):
            attention.prefix.order = rows if other_rows else None
            attention.prefix.scores.softcap = config.attention_logit_softcapping
    if any(isinstance(module, AdapterV2Linear) for module in model.modules()):
        for name, router in [(n, m) for n, m in model.named_modules() if type(m) is Router]:
            model.set_submodule(name, AdapterV2Linear(router))
    return other_rows


AdapterFolder = Union[LoRAFolder, PrefixFolder, LitPrefixFolder]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter but no model. LitGPT writes the merged model next to its LoRA."""
    if is_there(folder / CONFIG):
        return True
    return bool(lit_adapter_file(folder)) and not (folder / MODEL).is_file() and not has_hf_weights(folder)


def open_adapter(folder: Path) -> AdapterFolder:
    """Raises `UserError` if the folder is damaged, or has an unsupported kind of adapter."""
    if not (folder / CONFIG).is_file() and (file := lit_adapter_file(folder)):
        return LitLoRAFolder(file) if file.suffix == ".lora" else LitPrefixFolder(file)
    fields = read_json(folder / CONFIG)
    kind = fields.get("peft_type")
    if kind == "LORA":
        return LoRAFolder(folder, fields)
    if kind in KINDS:
        return PrefixFolder(folder, fields)
    known = ("LORA", *KINDS)
    raise UserError(
        f"{folder / CONFIG} has peft_type {kind!r}, which is not supported.{nearest(str(kind), known)} "
        f"Supported: {', '.join(known)}."
    )
