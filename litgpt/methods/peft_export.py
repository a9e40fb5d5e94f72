"""Writing LoRA as `peft` reads it.

What is written has one rank and one alpha, whatever was learned: what has a lower rank is filled up with zeros. Where
one Hugging Face module holds several blocks of ours, its A has the A's of all blocks below each other, and its B is
block-diagonal. Experts are stacked in transformers 5, and `peft` adapts the stack as a parameter of the module that
holds it, by `target_parameters`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import torch
from safetensors.torch import save_file
from torch import nn

from litgpt.families import aliases, weight_map
from litgpt.families.table import WeightMap
from litgpt.methods.lora import LoRA, LoRALinear, lora_layers
from litgpt.methods.peft_folder import CONFIG, PREFIX, WEIGHTS, Delta, fused_delta
from litgpt.methods.quantize import full_weight
from litgpt.model import GPT
from litgpt.model.sharded import full_tensor

Experts = dict[str, dict[str, dict[int, Delta]]]  # module with stacks of experts, its parameter, the expert


def write_lora(lora: LoRA, model: GPT, base: str, folder: Path) -> None:
    """Write both files into `folder`.

    Args:
        base: The base model: its repository id or its absolute path.
    """
    names = weight_map(model.config)
    deltas, experts = learned_deltas(model, names)
    stacked = [delta for params in experts.values() for one in params.values() for delta in one.values()]
    r = max((len(delta.a) for delta in (*deltas.values(), *stacked)), default=lora.r)
    alpha = lora.scaling * r if lora.variant == "rslora" else lora.alpha * r / lora.r
    in_full = trained_embeddings(model, names, deltas)
    parameters = [f"{module}.{name}" for module, params in experts.items() for name in params]
    modules = list(deltas)
    if model.config.n_expert:  # peft would take these for the experts
        dense = [module for module in modules if ".mlp." in module]
        modules = [module for module in modules if module not in dense]
        parameters += [f"{module}.weight" for module in dense]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if parameters else lora.dropout,  # of a parameter peft has none
        "use_dora": lora.variant == "dora",
        "target_modules": target_modules(set(modules), model, names),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted({n.split(".")[-2] for n in in_full if ".base_layer." not in n}) or None,
        "bias": "none",
        "fan_in_fan_out": any(holder.transposed for name in lora_layers(model) for holder in names.stored(name)),
        "inference_mode": True,
    }
    tensors = in_full | named_tensors(deltas, r) | stacked_tensors(experts, r, model.config.n_expert)
    weights = {PREFIX + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def in_memory(model: GPT, module: str) -> str:
    """The name that `transformers` has in memory for a module of the table, which adapters go by."""
    return aliases(model.config.model_type).in_memory(module)


@torch.no_grad()
def learned_deltas(model: GPT, names: WeightMap) -> tuple[dict[str, Delta], Experts]:
    """What was learned, by the names in memory of the modules that hold it; that of the experts apart."""
    deltas: dict[str, Delta] = {}
    experts: Experts = defaultdict(lambda: defaultdict(dict))
    for name, layer in lora_layers(model).items():
        stored = names.stored(name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert:
            module, parameter = stack(stored[0].module, expert[1], model)
            experts[module][parameter][int(expert[1])] = fused(layer)
        elif len(stored) > 1:
            for i, a, b, magnitude in layer.learned():
                deltas[in_memory(model, stored[i].module)] = Delta(a, b, 1.0, magnitude)
        else:
            deltas[in_memory(model, stored[0].module)] = fused(layer, stored[0].rows)
    return deltas, experts


def stack(module: str, expert: str, model: GPT) -> tuple[str, str]:
    """The module and the parameter that hold the stack in memory to which a module of an expert belongs."""
    for end, parts in aliases(model.config.model_type).stacks.items():
        own = parts[0].format(expert).removesuffix(".weight")
        if module.endswith(own):
            _, holder, parameter = end.rpartition(".experts")
            stem = in_memory(model, module.removesuffix(own) + holder)
            return stem, parameter.removeprefix(".")
    raise AssertionError(f"{module} is in no stack")


def fused(layer: LoRALinear, rows: Optional[torch.Tensor] = None) -> Delta:
    """One update for all blocks of a layer, of the ranks of the adapted blocks together.

    Args:
        rows: For each row of the module that holds the layer, which of ours it is.
    """
    learned = list(layer.learned())
    delta = fused_delta({i: (a, b) for i, a, b, _ in learned}, layer.sizes, 1.0)
    a, b = delta.a, delta.b
    # a row that nothing is added to keeps its norm
    magnitude = full_weight(layer.linear).float().norm(dim=1) if layer.magnitude is not None else None
    for i, _, _, norms in learned:
        if magnitude is not None and norms is not None:
            row = sum(layer.sizes[:i])
            magnitude[row : row + layer.sizes[i]] = norms
    if rows is not None:
        rows = rows.to(b.device)
        b, magnitude = b[rows], None if magnitude is None else magnitude[rows]
    return Delta(a, b, 1.0, magnitude)


def padded(delta: Delta, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in_features) and B (rows, r), filled up with zeros."""
    missing = r - len(delta.a)
    return nn.functional.pad(delta.a, (0, 0, 0, missing)), nn.functional.pad(delta.b, (0, missing))


def named_tensors(deltas: Mapping[str, Delta], r: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, delta in deltas.items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = padded(delta, r)
        if delta.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = delta.magnitude
    return tensors


def stacked_tensors(experts: Experts, r: int, n_expert: int) -> dict[str, torch.Tensor]:
    """A (experts * r, in_features) and B (rows, r * experts, the expert last) of each stack.

    In `peft` the module is wrapped once for each of its parameters, `gate_up_proj` first; what is inside is called
    `base_layer`.
    """
    tensors = {}
    for module, params in experts.items():
        for depth, parameter in enumerate(sorted(params, reverse=True)):  # the last is the outermost
            adapted = {expert: padded(delta, r) for expert, delta in params[parameter].items()}
            a, b = next(iter(adapted.values()))
            nothing = torch.zeros_like(a), torch.zeros_like(b)
            both = [adapted.get(expert, nothing) for expert in range(n_expert)]
            wrapper = module + ".base_layer" * (len(params) - 1 - depth)
            tensors[f"{wrapper}.lora_A.weight"] = torch.cat([a for a, _ in both])
            tensors[f"{wrapper}.lora_B.weight"] = torch.stack([b for _, b in both], dim=-1).flatten(1)
    return tensors


def trained_embeddings(model: GPT, names: WeightMap, deltas: Mapping[str, Delta]) -> dict[str, torch.Tensor]:
    """The embedding by its name in memory, if it was trained, and a tied head: `peft` would leave it as it was.

    Args:
        deltas: The updates by the names of their modules. Of a head with an update, `peft` stores the weight itself as
            that of its `base_layer`.
    """
    if not model.transformer.wte.weight.requires_grad:
        return {}
    embedding = full_tensor(model.transformer.wte.weight)
    tensors = {in_memory(model, names.embedding): embedding}
    if model.config.tie_embeddings:
        head, parameters = in_memory(model, names.head).removesuffix(".weight"), names.parameters(model)
        tensors[f"{head}.base_layer.weight" if head in deltas else f"{head}.weight"] = embedding.clone()
        if "lm_head.bias" in parameters and head not in deltas:  # peft takes whole modules
            tensors[f"{head}.bias"] = full_tensor(parameters["lm_head.bias"].value)
    return tensors


def target_modules(adapted: set[str], model: GPT, names: WeightMap) -> list[str]:
    """The names for `target_modules` that select exactly these modules: their last parts if that is enough."""
    if names.kept.pattern != r"(?!)":  # the parts of the model that are not read may have the same names
        return sorted(adapted)
    linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    every = {in_memory(model, form.module) for name in linears for form in names.stored(name)}
    leaves = {module.rpartition(".")[2] for module in adapted}
    same_leaf = {hf for hf in every if hf.rpartition(".")[2] in leaves}
    return sorted(leaves if same_leaf == adapted else adapted)
