"""Writes LoRA in PEFT's format.

The result has one rank and one alpha. Updates of a lower rank are padded with zeros. transformers 5 stacks experts, and
`peft` adapts the stack as a parameter of the module that holds it, by `target_parameters`.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from litgpt.families import aliases, weight_map
from litgpt.families.table import Parameter, StoredTensor, WeightMap
from litgpt.methods.deltas import Delta, fused, learned_deltas
from litgpt.methods.lora import LoRA, lora_layers
from litgpt.methods.peft_folder import CONFIG, PREFIX, WEIGHTS, expert_slices
from litgpt.model.gpt import GPT
from litgpt.model.sharded import full_tensor

Stacks = dict[str, dict[str, dict[int, Delta]]]  # by the module that holds stacks, its parameter, and the expert


def write_lora(lora: LoRA, model: GPT, base: str, folder: Path) -> None:
    """Write `adapter_config.json` and the tensors. `base` is the base's repository id or absolute path."""
    names = weight_map(model.config)
    deltas, stacks = in_memory_deltas(model)
    stacked = [delta for params in stacks.values() for experts in params.values() for delta in experts.values()]
    r = max((len(delta.a) for delta in (*deltas.values(), *stacked)), default=lora.r)
    alpha = lora.scaling * r if lora.variant == "rslora" else lora.alpha * r / lora.r
    in_full, saved = full_weights(lora, model, names, deltas)
    parameters = [f"{module}.{name}" for module, params in stacks.items() for name in params]
    modules = list(deltas)
    if model.config.n_expert:  # peft would take dense MLPs for the experts
        dense = [module for module in modules if ".mlp." in module]
        modules = [module for module in modules if module not in dense]
        parameters += [f"{module}.weight" for module in dense]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if parameters else lora.dropout,  # peft has no dropout for parameters
        "use_dora": lora.variant == "dora",
        "target_modules": target_modules(set(modules), model, names),
        "target_parameters": sorted(parameters) or None,
        **saved,
        "fan_in_fan_out": any(holder.transposed for name in lora_layers(model) for holder in names.stored(name)),
        "inference_mode": True,
    }
    tensors = in_full | module_tensors(deltas, r) | stack_tensors(stacks, r, model.config.n_expert)
    weights = {PREFIX + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def in_memory(model: GPT, module: str) -> str:
    """The name that a module of the table has in the memory of `transformers`. Adapters use it."""
    return aliases(model.config.model_type).in_memory(module)


def in_memory_deltas(model: GPT) -> tuple[dict[str, Delta], Stacks]:
    """The updates by the names in memory of their modules, and those of stacked experts."""
    deltas: dict[str, Delta] = {}
    experts: dict[tuple[str, str, int, int], dict[int, Delta]] = defaultdict(dict)  # by expert, then by its part
    for module, delta in learned_deltas(model).items():
        if ".experts." not in module:
            deltas[in_memory(model, module)] = delta
            continue
        holder, parameter, number, n_parts, part = place_in_stack(module, model)
        experts[holder, parameter, number, n_parts][part] = delta
    stacks: Stacks = defaultdict(lambda: defaultdict(dict))
    for (holder, parameter, number, n_parts), parts in experts.items():
        n_rows = len(next(iter(parts.values())).b)
        stacks[holder][parameter][number] = fused(parts, [n_rows] * n_parts)
    return deltas, stacks


def place_in_stack(module: str, model: GPT) -> tuple[str, str, int, int, int]:
    """Where the stacks in memory hold a module of an expert: the module that holds the stack, its parameter, the number
    of the expert, how many parts an expert has there, and which of them this is."""
    expert = module.rpartition(".experts.")[2].partition(".")[0]
    for end, parts in aliases(model.config.model_type).stacks.items():
        for i, part in enumerate(parts):
            own = part.format(expert).removesuffix(".weight")
            if module.endswith(own):
                _, holder, parameter = end.rpartition(".experts")
                stem = in_memory(model, module.removesuffix(own) + holder)
                return stem, parameter.removeprefix("."), int(expert), len(parts), i
    raise AssertionError(f"{module} is not in a stack")


def padded(delta: Delta, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in_features) and B (rows, r), padded with zeros."""
    missing = r - len(delta.a)
    return nn.functional.pad(delta.a, (0, 0, 0, missing)), nn.functional.pad(delta.b, (0, missing))


def module_tensors(deltas: Mapping[str, Delta], r: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, delta in deltas.items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = padded(delta, r)
        if delta.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = delta.magnitude
    return tensors


def stack_tensors(stacks: Stacks, r: int, n_expert: int) -> dict[str, torch.Tensor]:
    """A and B of each stack, with the slices of `expert_slices`. `peft` wraps the module once for each of its
    parameters, `gate_up_proj` first, and calls what is inside `base_layer`."""
    tensors = {}
    for module, params in stacks.items():
        for depth, parameter in enumerate(sorted(params, reverse=True)):  # the last is the outermost
            experts = params[parameter]
            first = next(iter(experts.values()))
            a = first.a.new_zeros(n_expert * r, first.a.size(1))
            b = first.b.new_zeros(len(first.b), r * n_expert)
            for expert, delta in experts.items():
                rows_of_a, columns = expert_slices(expert, n_expert, r)
                a[rows_of_a], b[:, columns] = padded(delta, r)
            wrapper = module + ".base_layer" * (len(params) - 1 - depth)
            tensors[f"{wrapper}.lora_A.weight"], tensors[f"{wrapper}.lora_B.weight"] = a, b
    return tensors


def full_weights(
    lora: LoRA, model: GPT, names: WeightMap, deltas: Mapping[str, Delta]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The pretrained weights that the adapter has in full, by their names in memory, and the fields that tell which of
    them are trained. `peft` would leave a tied head unchanged, saves complete modules, and stores the weight of one
    with an update as that of a `base_layer`."""
    stored: list[tuple[Parameter, StoredTensor, str, str]] = []  # with the module and the leaf in memory
    for parameter in names.parameters(model).values():
        for tensor in parameter.tensors:
            module, _, leaf = in_memory(model, tensor.name).rpartition(".")
            stored.append((parameter, tensor, module, leaf))
    trained = {(module, leaf) for parameter, _, module, leaf in stored if parameter.value.requires_grad}
    copied = {module for module, leaf in trained if leaf == "weight" and module not in deltas}
    tensors = {}
    for parameter, tensor, module, leaf in stored:
        if (module, leaf) in trained or module in copied or tensor.name in lora.in_full:
            name = f"{module}.base_layer.{leaf}" if module in deltas else f"{module}.{leaf}"
            weight = tensor.form.from_ours(full_tensor(parameter.value)[tensor.rows])
            tensors[name] = weight.clone() if tensor.name == names.tied_head else weight
    ends = {in_memory(model, name).rpartition(".")[0] for name in (names.embedding, names.head)}
    fields = {
        "modules_to_save": sorted(m.rpartition(".")[2] if m in ends else m for m in copied) or None,
        "bias": "all" if any(leaf == "bias" and module not in copied for module, leaf in trained) else "none",
    }
    return tensors, fields


def target_modules(adapted: set[str], model: GPT, names: WeightMap) -> list[str]:
    """The `target_modules` that select exactly these modules: the last parts of their names if these are enough."""
    if names.kept.pattern != r"(?!)":  # parts of the model that litgpt does not run may have the same names
        return sorted(adapted)
    linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    every = {in_memory(model, hf.module) for name in linears for hf in names.stored(name)}
    leaves = {module.rpartition(".")[2] for module in adapted}
    same_leaf = {hf for hf in every if hf.rpartition(".")[2] in leaves}
    return sorted(leaves if same_leaf == adapted else adapted)
