"""LoRA in PEFT's form: a folder with `adapter_config.json` and `adapter_model.safetensors`.

The names are those of `peft` (https://github.com/huggingface/peft): `base_model.model.` before the Hugging Face module,
`lora_A.weight` (r, in_features), `lora_B.weight` (out_features, r) and, for DoRA, `lora_magnitude_vector`
(out_features,) behind it. A module that is trained in full stands there with its `weight`.

What is written has one rank and one alpha, whatever was learned.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import save_file
from torch import nn

from litgpt.checkpoint import base_parameters, opened
from litgpt.errors import UserError
from litgpt.families import name_table
from litgpt.files import read_json
from litgpt.lora import LoRA, lora_layers
from litgpt.model import GPT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MUST_BE = {  # what changes the math and is not implemented: the values that leave it as it is
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": ([],),
    "trainable_token_indices": ([],),
    "target_parameters": ([],),
    "lora_bias": (False,),
    # the others change the base when they are loaded
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "velora_config": ({},),
    "monteclora_config": ({},),
    "arrow_config": ({},),
    "kasa_config": ({},),
}


def learned_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """What was learned, under PEFT's names: the updates, and the embedding if it was trained."""
    table = name_table(model.config)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model).items():
        hf = table.to_hf(name)
        for i, tensors in layer.learned():
            weights |= {f"{PREFIX}{hf[i]}.{leaf}": t for leaf, t in tensors.items()}
    embedding = model.transformer.wte.weight
    if embedding.requires_grad:
        modules = table.to_hf("transformer.wte")
        if model.config.tie_embeddings:  # peft would train a copy and leave the head as it was
            modules += table.to_hf("lm_head")
        weights |= {f"{PREFIX}{module}.weight": embedding.clone() for module in modules}
    return {name: t.detach().cpu().contiguous() for name, t in weights.items()}


def write_lora(lora: LoRA, model: GPT, base: str, folder: Path) -> None:
    """Write both files into `folder`.

    Args:
        base: The base model: its repository id or its absolute path.
    """
    weights = learned_tensors(model)
    names = [name.removeprefix(PREFIX) for name in weights]
    adapted = {n.rpartition(".lora_")[0] for n in names if ".lora_" in n}
    in_full = {n.removesuffix(".weight").rpartition(".")[2] for n in names if ".lora_" not in n}
    r = lora.r * (2 if lora.init == "pissa" else 1)
    alpha = lora.scaling * r if lora.variant == "rslora" or lora.init == "pissa" else lora.alpha
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.dropout,
        "use_dora": lora.variant == "dora",
        "target_modules": target_modules(adapted, model),
        "modules_to_save": sorted(in_full) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def target_modules(adapted: set[str], model: GPT) -> list[str]:
    """The names for `target_modules` that select exactly these modules: their last parts if that is enough."""
    table = name_table(model.config)
    linears = (n.removesuffix(".linear") for n, m in model.named_modules() if isinstance(m, nn.Linear))
    leaves = {module.rpartition(".")[2] for module in adapted}
    same_leaf = {hf for name in linears for hf in table.to_hf(name) if hf.rpartition(".")[2] in leaves}
    return sorted(leaves if same_leaf == adapted else adapted)


@dataclass
class Delta:
    """What an adapter learned about one weight W (rows, in_features): W + scale b a, with rows of norm `magnitude`.

    Args:
        a: (r, in_features), float32.
        b: (rows, r), float32.
        scale: The factor of the update.
        magnitude: DoRA's, (rows,); None where it is not used.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: Optional[torch.Tensor] = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b), self.a.size(1)

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """In float32."""
        merged = weight.float() + self.scale * (self.b @ self.a)
        return merged if self.magnitude is None else merged * (self.magnitude / merged.norm(dim=1))[:, None]


class LoRAFolder:
    """A LoRA folder in PEFT's form, opened; its weights are read when they are wanted.

    Raises:
        UserError: it is damaged, or holds what is not implemented; the field is named.
    """

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.folder = folder
        for key, allowed in MUST_BE.items():
            if fields.get(key) and fields[key] not in allowed:
                raise UserError(f"{folder / CONFIG} has {key} {fields[key]!r}, which is not supported.")
        self.base = str(fields.get("base_model_name_or_path") or "")
        self.shapes = read_shapes(folder)
        self.tying = bool(fields.get("ensure_weight_tying"))
        self.dora, self.rslora = bool(fields.get("use_dora")), bool(fields.get("use_rslora"))
        patterns = fields.get("alpha_pattern") or {}
        try:
            r, self.alpha = int(fields["r"]), float(fields["lora_alpha"])
            self.alphas = {str(pattern): float(alpha) for pattern, alpha in patterns.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder / CONFIG} has no usable r and lora_alpha.") from e
        if r < 1:
            raise UserError(f"{folder / CONFIG} has r {r}, which must be above 0.")
        # a rank pattern shows in the shapes
        ranks = [shape[0] for name, shape in self.shapes.items() if name.endswith(".lora_A.weight")]
        modules = {n.rpartition(".lora_")[0] for n in self.shapes if ".lora_" in n}
        self.lora = LoRA(
            r=max(ranks, default=r),
            alpha=self.alpha,
            dropout=0.0,
            variant="dora" if self.dora else "lora",
            modules=frozenset(modules),
        )
        self.lora.scaling = self.scale("", r)  # where a module has another, its B makes up for it

    @property
    def description(self) -> str:
        kind = "DoRA" if self.dora else "LoRA"
        return f"{kind} of rank {self.lora.r}" + (", and whole weights" if self.in_full else "")

    @property
    def in_full(self) -> list[str]:
        """The names of the weights that take the place of the base's."""
        return [n for n in self.shapes if ".lora_" not in n]

    def apply(self, model: GPT) -> None:
        """Make room for the adapter in a model on the meta device."""
        self.lora.apply(model)

    def scale(self, module: str, r: int) -> float:
        """Of one module: peft matches the end of its name with the patterns."""
        matching = (a for pattern, a in self.alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = next(matching, self.alpha)
        return alpha / (math.sqrt(r) if self.rslora else r)

    def deltas(self) -> dict[str, Delta]:
        """What was learned, by Hugging Face module, in float32.

        Raises:
            UserError: an A without its B, or a tensor with a name that is not LoRA's.
        """
        found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        with opened(self.folder / WEIGHTS) as f:
            for name in self.shapes:
                module, lora, leaf = name.rpartition(".lora_")
                if lora:
                    found[module][leaf] = f.get_tensor(PREFIX + name).float()
        wanted = {"A.weight", "B.weight", *(["magnitude_vector"] if self.dora else [])}
        wrong = sorted(m for m, tensors in found.items() if set(tensors) != wanted)
        if wrong:
            leaves = " or ".join(f"lora_{leaf.partition('.')[0]}" for leaf in sorted(wanted))
            raise UserError(f"{self.folder / WEIGHTS} lacks {leaves} for: {', '.join(wrong)}.")
        deltas = {}
        for module, t in found.items():
            a, b = t["A.weight"], t["B.weight"]
            deltas[module] = Delta(a, b, self.scale(module, len(a)), t.get("magnitude_vector"))
        return deltas

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The weights that take the place of the base's, by their Hugging Face names."""
        with opened(self.folder / WEIGHTS) as f:
            return {name: f.get_tensor(PREFIX + name) for name in self.in_full}

    @torch.no_grad()
    def load_into(self, model: GPT) -> None:
        """Fill what `apply` made room for.

        Raises:
            UserError: modules or shapes that the model does not have; all of them at once.
        """
        table, deltas = name_table(model.config), self.deltas()
        wrong = []
        for name, layer in lora_layers(model).items():
            hf = table.to_hf(name)
            magnitudes = layer.magnitude.split(layer.adapted_sizes) if layer.magnitude is not None else ()
            magnitude = iter(magnitudes)
            for i, a, b in layer.blocks():
                delta, norms = deltas.pop(hf[i]), next(magnitude, None)
                if delta.shape != (len(b), a.size(1)):
                    wrong.append(f"{hf[i]} {delta.shape}")
                    continue
                r = len(delta.a)
                a.zero_()[:r] = delta.a  # a lower rank is filled up with zeros
                b.zero_()[:, :r] = delta.b * (delta.scale / self.lora.scaling)
                if norms is not None and delta.magnitude is not None:
                    norms.copy_(delta.magnitude)
        wrong += sorted(deltas)
        wrong += self.put_whole_weights(model)
        if wrong:
            raise UserError(f"The adapter in {self.folder} does not fit the model: {'; '.join(wrong)}.")

    def put_whole_weights(self, model: GPT) -> list[str]:
        """Replace the base's weights by the adapter's; returns those that the model does not have."""
        table, slots, wrong = name_table(model.config), base_parameters(model), []
        given = self.whole_weights()
        self.check_tied(given, model)
        for name, weight in given.items():
            ours, part = table.from_hf(name.rpartition(".")[0]) or ("", 0)
            if ours == "lm_head" and model.config.tie_embeddings:
                ours = "transformer.wte"
            module, leaf = slots.get(f"{ours}.{name.rpartition('.')[2]}", (None, ""))
            if module is None:
                wrong.append(name)
                continue
            rows = getattr(module, leaf).detach()
            target = rows.split(getattr(module, "parts", (len(rows),)))[part]
            if target.shape == weight.shape:
                target.copy_(weight)
            else:
                wrong.append(f"{name} {tuple(weight.shape)}")
        return wrong

    def check_tied(self, given: dict[str, torch.Tensor], model: GPT) -> None:
        """Raise `UserError` where the adapter tears a tied head from its embedding."""
        table = name_table(model.config)
        (head,), (embedding,) = table.to_hf("lm_head"), table.to_hf("transformer.wte")
        pair = given.get(f"{head}.weight"), given.get(f"{embedding}.weight")
        if not model.config.tie_embeddings or pair == (None, None):
            return
        if self.tying and (pair[0] is None or pair[1] is None):
            return
        if pair[0] is None or pair[1] is None or not torch.equal(pair[0], pair[1]):
            raise UserError(
                f"The adapter in {self.folder} holds an embedding and a head that differ, but the model has one weight "
                "for both (tie_word_embeddings): this is not supported."
            )


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in an adapter's file, by name without PEFT's prefix.

    Raises:
        UserError: the file is missing, or cut short.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}.")
    with opened(folder / WEIGHTS) as f:
        return {name.removeprefix(PREFIX): tuple(f.get_slice(name).get_shape()) for name in sorted(f.keys())}


def read_fields(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a folder. Raises `UserError` if it is not an object."""
    fields = read_json(folder / CONFIG)
    if not isinstance(fields, dict):
        raise UserError(f"{folder / CONFIG} is no JSON object.")
    return fields
