"""Adapter folders: LoRA in PEFT's format, LLaMA-Adapter and its second version in our own, and those of LitGPT."""

import json
from pathlib import Path
from typing import Any, Union

import torch
from safetensors.torch import save_file

from litgpt.checkpoint.folder import opened
from litgpt.errors import UserError, nearest
from litgpt.litgpt_format.folder import MODEL, has_hf_weights, lit_adapter_file
from litgpt.methods.adapter import LLaMAAdapter, trained
from litgpt.methods.adapter_v2 import LLaMAAdapterV2
from litgpt.methods.litgpt_folder import LitLoRAFolder, LitPrefixFolder
from litgpt.methods.peft_folder import CONFIG, WEIGHTS, LoRAFolder, read_shapes, weights_file
from litgpt.model import GPT
from litgpt.model.sharded import full_tensor
from litgpt.storage.files import is_there, read_json

KINDS = {"LITGPT_ADAPTER": LLaMAAdapter, "LITGPT_ADAPTER_V2": LLaMAAdapterV2}  # by peft_type


def write_adapter(adapter: LLaMAAdapter, model: GPT, base: str, folder: Path) -> None:
    """Write `adapter_config.json`, and the trained weights under our names.

    Args:
        base: The base model: its repository id or its absolute path.
    """
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
    """A folder of LLaMA-Adapter or its second version.

    Raises:
        UserError: the folder is damaged.
    """

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.folder = folder
        self.base = str(fields.get("base_model_name_or_path") or "")
        self.file, self.shapes = weights_file(folder), read_shapes(folder)
        try:
            length, start = int(fields["adapter_prompt_length"]), int(fields["adapter_start_layer"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder / CONFIG} has no usable adapter_prompt_length and adapter_start_layer.") from e
        self.adapter = KINDS[fields["peft_type"]](length, start)

    @property
    def description(self) -> str:
        return str(self.adapter)

    def apply(self, model: GPT) -> None:
        """Add the adapter to a model on the meta device.

        Raises:
            UserError: names or shapes do not fit the model; all of them at once.
        """
        start, n_layer = self.adapter.start_layer, model.config.n_layer
        if start >= n_layer:
            raise UserError(
                f"{self.folder / CONFIG}: adapter_start_layer is {start}, but the model has {n_layer} layers."
            )
        self.adapter.apply(model)
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
        """Fill the parameters that `apply` added."""
        with opened(self.file) as f:
            for name, parameter in trained(model).items():
                parameter.copy_(f.get_tensor(name))


AdapterFolder = Union[LoRAFolder, PrefixFolder, LitPrefixFolder]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter but no model. LitGPT writes the merged model next to its LoRA."""
    if is_there(folder / CONFIG):
        return True
    return bool(lit_adapter_file(folder)) and not (folder / MODEL).is_file() and not has_hf_weights(folder)


def open_adapter(folder: Path) -> AdapterFolder:
    """Raises:
    UserError: the folder is damaged, or has an unsupported kind of adapter.
    """
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
