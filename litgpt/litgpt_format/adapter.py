"""What LitGPT's finetuning leaves: `lit_model.pth.lora`, `.adapter` and `.adapter_v2`, and `hyperparameters.yaml`."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.families import name_table
from litgpt.litgpt_format.folder import ADAPTERS, lit_modules, our_module, read_pth
from litgpt.model.config import Config
from litgpt.storage.files import is_there, read_yaml

SETTINGS = "hyperparameters.yaml"
Blocks = dict[int, tuple[torch.Tensor, torch.Tensor]]  # A and B, by the number of the block of a layer


def lit_adapter_file(folder: Path) -> Optional[Path]:
    """The file of LitGPT's adapter in a folder, if there is one."""
    return next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that made a folder; empty if it does not have them.

    Raises:
        UserError: they cannot be read.
    """
    file = folder / SETTINGS
    return read_yaml(file) if is_there(file) else {}


def read_lora(file: Path, r: int, adapted: list[int], config: Config) -> dict[str, Blocks]:
    """The A and B of each adapted block of our layers.

    Args:
        file: The `lit_model.pth.lora`.
        r: The rank.
        adapted: Which of q, k and v have LoRA.

    Raises:
        UserError: layers that the model does not have, or shapes that do not fit the settings.
    """
    weights, table = read_pth(file), name_table(config)
    found: dict[str, Blocks] = defaultdict(dict)
    wrong = []
    for theirs in sorted({re.sub(r"\.lora_[AB]$", "", name) for name in weights}):
        ours, block = our_module(theirs)
        a, b = (weights.get(f"{theirs}.lora_{x}") for x in "AB")
        fused = ours.endswith("attn.qkv")
        sizes = [config.qkv_sizes[i] for i in adapted] if fused else [len(b) if b is not None else 0]
        if a is None or b is None or not table.stored(ours):
            wrong.append(theirs)
        elif len(a) != r * len(sizes) or tuple(b.shape) != (sum(sizes), r):
            wrong.append(f"{theirs} {tuple(a.shape)}, {tuple(b.shape)}")
        else:
            numbers = adapted if fused else [block]
            for i, a_part, b_part in zip(numbers, a.float().split(r), b.float().split(sizes)):
                found[ours][i] = a_part, b_part
    if wrong:
        raise UserError(f"{file} does not fit the model and its {SETTINGS}: {'; '.join(wrong)}.")
    return found


def prefix_sources(weights: dict[str, torch.Tensor], path: str, leaf: str, layer: nn.Module) -> list[str]:
    """The tensors of LitGPT's file that hold a trained parameter of ours.

    Args:
        path: Our name of the module.
        leaf: Our name of its parameter.
        layer: The layer itself, without a wrapper.
    """
    if path.endswith(".prefix"):
        return [path.removesuffix("prefix") + {"embedding": "adapter_wte.weight", "gate": "gating_factor"}[leaf]]
    modules = lit_modules(re.sub(r"(\.linear)+$", "", path), layer)
    old = f"{path.removesuffix('qkv')}attn.{leaf}"
    return [old] if path.endswith("attn.qkv") and old in weights else [f"{m}.{leaf}" for m in modules]
