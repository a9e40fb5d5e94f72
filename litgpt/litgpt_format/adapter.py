"""The output of LitGPT's finetuning: `lit_model.pth.lora`, `.adapter` or `.adapter_v2`, and `hyperparameters.yaml`."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.families.table import without_wrappers
from litgpt.litgpt_format.folder import ADAPTERS, lit_modules, our_module, read_pth
from litgpt.model.config import Config
from litgpt.storage.files import is_there, read_yaml

SETTINGS = "hyperparameters.yaml"
Blocks = dict[int, tuple[torch.Tensor, torch.Tensor]]  # A and B by the index of a layer's block


def lit_adapter_file(folder: Path) -> Optional[Path]:
    """The file of a LitGPT adapter in a folder, if there is one."""
    return next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that wrote a folder, empty if missing. Raises `UserError` if they are unreadable."""
    file = folder / SETTINGS
    return read_yaml(file) if is_there(file) else {}


def read_lora(file: Path, r: int, adapted: list[int], config: Config) -> dict[str, Blocks]:
    """The A and B of each adapted block of our layers.

    Args:
        file: The `lit_model.pth.lora`.
        r: The rank.
        adapted: The indices of the adapted ones of q, k and v.

    Raises:
        UserError: the model lacks a layer, or a shape does not fit the settings.
    """
    weights, names = read_pth(file), weight_map(config)
    found: dict[str, Blocks] = defaultdict(dict)
    wrong = []
    for theirs in sorted({re.sub(r"\.lora_[AB]$", "", name) for name in weights}):
        ours, block = our_module(theirs)
        a, b = (weights.get(f"{theirs}.lora_{x}") for x in "AB")
        fused = ours.endswith("attn.qkv")
        sizes = [config.qkv_sizes[i] for i in adapted] if fused else [len(b) if b is not None else 0]
        if a is None or b is None or not names.stored(ours):
            wrong.append(theirs)
        elif len(a) != r * len(sizes) or tuple(b.shape) != (sum(sizes), r):
            wrong.append(f"{theirs} {tuple(a.shape)}, {tuple(b.shape)}")
        else:
            numbers = adapted if fused else [block]
            for i, a_part, b_part in zip(numbers, a.float().split(r), b.float().split(sizes)):
                found[ours][i] = a_part, b_part
    if wrong:
        raise UserError(f"{file} does not match the model and its {SETTINGS}: {'; '.join(wrong)}.")
    return found


def prefix_sources(weights: dict[str, torch.Tensor], path: str, leaf: str, layer: nn.Module) -> list[str]:
    """The names of the tensors in LitGPT's file that hold a trained parameter of ours.

    Args:
        path: The name of our module.
        leaf: The name of its parameter.
        layer: The layer without a wrapper.
    """
    if path.endswith(".prefix"):
        return [path.removesuffix("prefix") + {"embedding": "adapter_wte.weight", "gate": "gating_factor"}[leaf]]
    modules = lit_modules(without_wrappers(path), layer)
    old = f"{path.removesuffix('qkv')}attn.{leaf}"
    return [old] if path.endswith("attn.qkv") and old in weights else [f"{m}.{leaf}" for m in modules]
