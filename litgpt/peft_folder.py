"""LoRA in PEFT's form: a folder with `adapter_config.json` and `adapter_model.safetensors`.

The names are those of `peft` (https://github.com/huggingface/peft): `base_model.model.` before the Hugging Face module,
`lora_A.weight` (r, in_features) and `lora_B.weight` (out_features, r) behind it.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from litgpt.checkpoint import opened
from litgpt.errors import UserError
from litgpt.families import name_table
from litgpt.files import read_json
from litgpt.lora import LoRA, lora_layers
from litgpt.model import GPT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MUST_BE = {  # what changes the math and is not implemented: the values that leave it as it is
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([],),
    "target_parameters": ([],),
    "lora_bias": (False,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # the others change the base when they are loaded
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "velora_config": ({},),
    "monteclora_config": ({},),
    "arrow_config": ({},),
    "kasa_config": ({},),
}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def adapter_weights(model: GPT) -> dict[str, torch.Tensor]:
    """A and B of every adapted Hugging Face module, under PEFT's names."""
    table, weights = name_table(model.config), {}
    for name, layer in lora_layers(model).items():
        hf = table.to_hf(name)
        for i, a, b in layer.blocks():
            weights[f"{PREFIX}{hf[i]}.lora_A.weight"] = a.detach().cpu().contiguous()
            weights[f"{PREFIX}{hf[i]}.lora_B.weight"] = b.detach().cpu().contiguous()
    return weights


def write_adapter(lora: LoRA, model: GPT, base: str, folder: Path) -> None:
    """Write both files into `folder`.

    Args:
        base: The base model: its repository id or its absolute path.
    """
    weights = adapter_weights(model)
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in weights}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted({m.rpartition(".")[2] for m in modules}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


class Adapter:
    """A LoRA folder in PEFT's form, opened; its weights are read when they are wanted.

    Raises:
        UserError: it is damaged, or holds what is not implemented; the field is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields = read_json(folder / CONFIG)
        if not isinstance(fields, dict):
            raise UserError(f"{folder / CONFIG} is no JSON object.")
        for key, allowed in MUST_BE.items():
            if fields.get(key) and fields[key] not in allowed:
                raise UserError(f"{folder / CONFIG} has {key} {fields[key]!r}, which is not supported.")
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} has no {WEIGHTS}.")
        self.base = str(fields.get("base_model_name_or_path") or "")
        self.shapes: dict[str, tuple[int, ...]] = {}
        with opened(folder / WEIGHTS) as f:
            for name in sorted(f.keys()):
                self.shapes[name] = tuple(f.get_slice(name).get_shape())
        modules = frozenset(n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in self.shapes)
        try:
            r, alpha = int(fields["r"]), float(fields["lora_alpha"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder / CONFIG} has no usable r and lora_alpha.") from e
        if r < 1:
            raise UserError(f"{folder / CONFIG} has r {r}, which must be above 0.")
        self.lora = LoRA(r=r, alpha=alpha, dropout=0.0, modules=modules)

    def deltas(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B in float32 by Hugging Face module.

        Raises:
            UserError: an A without its B, or a tensor with a name that is not LoRA's.
        """
        pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        with opened(self.folder / WEIGHTS) as f:
            for name in self.shapes:
                module, _, leaf = name.removeprefix(PREFIX).rpartition(".lora_")
                pairs[module][leaf] = f.get_tensor(name).float()
        wrong = [m for m, pair in pairs.items() if set(pair) != {"A.weight", "B.weight"}]
        if wrong:
            raise UserError(f"{self.folder / WEIGHTS} lacks lora_A or lora_B for: {', '.join(sorted(wrong))}.")
        return {m: (pair["A.weight"], pair["B.weight"]) for m, pair in pairs.items()}

    def load_into(self, model: GPT) -> None:
        """Fill the `LoRALinear` layers of a model to which `self.lora` was applied.

        Raises:
            UserError: modules or shapes that the model does not have; all of them at once.
        """
        table, deltas = name_table(model.config), self.deltas()
        wrong = []
        for name, layer in lora_layers(model).items():
            hf = table.to_hf(name)
            for i, a, b in layer.blocks():
                new_a, new_b = deltas.pop(hf[i])
                if (new_a.shape, new_b.shape) != (a.shape, b.shape):
                    wrong.append(f"{hf[i]} {tuple(new_a.shape)}, {tuple(new_b.shape)}")
                    continue
                a.data.copy_(new_a)
                b.data.copy_(new_b)
        wrong += sorted(deltas)
        if wrong:
            raise UserError(f"The adapter in {self.folder} does not fit the model: {'; '.join(wrong)}.")
