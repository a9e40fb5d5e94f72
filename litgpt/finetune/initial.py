"""Training on from an adapter: its folder determines the layers, and options must not contradict it."""

from dataclasses import replace
from typing import Any

import torch

from litgpt.errors import UserError
from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2
from litgpt.methods.adapter_folder import AdapterFolder, LitPrefixFolder, PrefixFolder
from litgpt.methods.deltas import adapted_modules
from litgpt.methods.lora import TARGETS, LoRA
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.train.args import run_flags
from litgpt.train.base_model import BaseModel

COMMANDS = {LoRA: "finetune lora", LLaMAAdapter: "finetune adapter", LLaMAAdapterV2: "finetune adapter_v2"}


def continued_lora(lora: LoRA, base_model: BaseModel) -> LoRA:
    """The layers to train: those of the options, or those of the initial adapter. Raises `UserError` if options
    contradict it."""
    adapter = base_model.adapter
    if adapter is None:
        return lora
    if not isinstance(adapter, LoRAFolder):
        raise wrong_method(adapter)
    assert base_model.checkpoint is not None
    free = {name: getattr(lora, name) for name in ("dropout", "plus_ratio", "train_embeddings")}
    continued = adapter.to_train(base_model.checkpoint, **free)
    refuse(contradictions(lora, continued, adapter, base_model.config), adapter)
    return continued


def continued_adapter(options: LLaMAAdapter, base_model: BaseModel) -> LLaMAAdapter:
    """The same for LLaMA-Adapter and its second version."""
    folder = base_model.adapter
    if folder is None:
        return options
    if not isinstance(folder, PrefixFolder) or type(folder.adapter) is not type(options):
        raise wrong_method(folder)
    adapter, default = folder.adapter, LLaMAAdapter()
    refuse(
        [
            f"--adapter_{name} {getattr(options, name)}, but it has {getattr(adapter, name)}"
            for name in ("prompt_length", "start_layer")
            if getattr(options, name) != getattr(adapter, name)
            and is_given(f"adapter_{name}", getattr(options, name), getattr(default, name))
        ],
        folder,
    )
    return adapter


def is_given(name: str, value: Any, default: Any) -> bool:
    """Whether an option was chosen: by a flag, or because it is not at its default."""
    return name in run_flags.get() or value != default


def contradictions(lora: LoRA, adapter: LoRA, folder: LoRAFolder, config: Config) -> list[str]:
    """The options of `lora` that were chosen and that `adapter`, which is in `folder`, does not have."""

    def chosen(name: str) -> bool:
        return is_given(f"lora_{name}", getattr(lora, name), getattr(LoRA, name))

    wrong = []
    if chosen("r") and lora.r != adapter.r:
        wrong.append(f"--lora_r {lora.r}, but it has {adapter.r}")
    if chosen("variant") and (lora.variant == "dora") != (adapter.variant == "dora"):
        wrong.append(f"--lora_variant {lora.variant}, but it is a {folder.description}")
    if chosen("alpha"):
        variant = lora.variant if chosen("variant") else "rslora" if folder.rslora else "lora"
        scaling = replace(lora, r=adapter.r, variant=variant).scaling
        if abs(scaling - adapter.scaling) > 1e-6 * scaling:
            wrong.append(f"--lora_alpha {lora.alpha}, but its updates are multiplied by {adapter.scaling:g}")
    if chosen("init"):
        wrong.append(f"--lora_init {lora.init}, but training starts from its weights")
    if "train_embeddings" in run_flags.get() and not lora.train_embeddings and any(adapter.in_full.values()):
        wrong.append("--train_embeddings false, but it has trained embeddings")
    selecting = [name for name in (*TARGETS, "targets", "layers") if chosen(name)]
    if selecting:
        plain = replace(lora, variant="lora", init="kaiming", train_embeddings=False)
        selected, updated = (layers_of(options, config) for options in (plain, replace(adapter, in_full={})))
        if selected != updated:
            words = " ".join(f"--lora_{name} {str(getattr(lora, name)).lower()}" for name in selecting)
            wrong.append(f"{words}, but it updates {', '.join(sorted({m.rpartition('.')[2] for m in updated}))}")
    return wrong


def layers_of(lora: LoRA, config: Config) -> set[str]:
    with torch.device("meta"):
        model = GPT(config)
    lora.apply(model)
    return adapted_modules(model)


def refuse(wrong: list[str], folder: AdapterFolder) -> None:
    if wrong:
        raise UserError(
            f"Training continues the adapter in {folder.folder}, which does not change its layers. Omit: "
            f"{'; '.join(wrong)}."
        )


def wrong_method(folder: AdapterFolder) -> UserError:
    if isinstance(folder, LitPrefixFolder):
        return UserError(f"{folder.folder} is a {folder.description}, which cannot be trained further.")
    kind = LoRA if isinstance(folder, LoRAFolder) else type(folder.adapter)
    return UserError(f"{folder.folder} is a {folder.description}. Use: litgpt {COMMANDS[kind]} {folder.folder}")
