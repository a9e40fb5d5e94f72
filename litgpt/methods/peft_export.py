"""Writes LoRA in PEFT's format.

The result has one rank and one alpha. Updates of a lower rank are padded with zeros. transformers 5 stacks experts, but
here each expert has modules of its own, as in transformers 4: vLLM and SGLang expect that, and `peft` converts it. They
expect all experts of a layer, so modules of experts without an update get one that is zero. Families that never had
modules for experts, like gpt-oss, have updates of the stacks.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from litgpt.families import aliases, weight_map
from litgpt.families.family import MTP
from litgpt.families.table import Aliases, Parameter, StoredTensor, WeightMap
from litgpt.methods.deltas import Delta, learned_deltas
from litgpt.methods.lora import LoRA, lora_layers
from litgpt.methods.peft_folder import CONFIG, PREFIX, WEIGHTS
from litgpt.model.gpt import GPT
from litgpt.model.sharded import full_tensor

EXPERT = re.compile(r"\.experts\.\d+\.")  # in the names of an expert's modules
MAX_RANK = 512  # of vLLM


def write_lora(lora: LoRA, model: GPT, base: str, folder: Path) -> None:
    """Write `adapter_config.json` and the tensors. `base` is the base's repository id or absolute path."""
    names, own = weight_map(model.config), aliases(model.config.model_type)
    learned = learned_deltas(model)
    deltas = {in_adapter(model, module): delta for module, delta in (learned | idle_experts(learned, model)).items()}
    r = max((len(delta.a) for delta in deltas.values()), default=lora.r)
    alpha = lora.scaling * r if lora.variant == "rslora" else lora.alpha * r / lora.r
    in_full, saved = full_weights(lora, model, names, deltas)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.dropout,
        "use_dora": lora.variant == "dora",
        **targets(set(deltas), model, names, r, alpha),
        **saved,
        "fan_in_fan_out": any(
            form.transposed and not EXPERT.search(form.module)
            for name in lora_layers(model)
            for form in names.stored(name)
        ),
        "inference_mode": True,
    }
    if fields["target_parameters"] or any(map(EXPERT.search, deltas)):
        fields["lora_dropout"] = 0.0  # peft has no dropout for parameters
    weights = {
        PREFIX + name: t.detach().cpu().contiguous() for name, t in (in_full | tensors_of(deltas, r, own)).items()
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def unloadable(lora: LoRA, model: GPT) -> list[str]:
    """What the adapter of a model will have that vLLM or SGLang do not load."""
    names, layers = weight_map(model.config), lora_layers(model)
    ranks = [lora.r * (sum(layer.adapted) if len(names.stored(name)) == 1 else 1) for name, layer in layers.items()]
    rank = max(ranks, default=0) * (2 if lora.init == "pissa" else 1)
    found = {
        "DoRA": lora.variant == "dora",
        "trained embeddings": lora.train_embeddings,
        "fully trained weights": bool(lora.in_full) and not lora.train_embeddings,
        "LoRA on the head": any(name.startswith("lm_head") for name in layers),
        f"a rank above {MAX_RANK} ({rank})": rank > MAX_RANK,
    }
    return [what for what, applies in found.items() if applies]


def in_memory(model: GPT, module: str) -> str:
    """The name that a module of the table has in the memory of `transformers`. Adapters use it."""
    return aliases(model.config.model_type).in_memory(module)


def in_adapter(model: GPT, module: str) -> str:
    """The name of a module of the table in an adapter. Modules of experts are not in memory."""
    return module if EXPERT.search(module) else in_memory(model, module)


def idle_experts(learned: Mapping[str, Delta], model: GPT) -> dict[str, Delta]:
    """Updates that are zero for the modules of experts that have none, in layers where one has."""
    layers = {EXPERT.split(module)[0] for module in learned if EXPERT.search(module)}
    width, size = model.config.n_embd, model.config.moe_intermediate_size or model.config.intermediate_size
    idle = {}
    for ours, stored in weight_map(model.config).rules.items():
        rows, columns = (width, size) if ours.endswith(".proj") else (2 * size // len(stored), width)
        for module in (form.module for form in stored if EXPERT.search(form.module)):
            if module not in learned and EXPERT.split(module)[0] in layers:
                idle[module] = Delta(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)
    return idle


def padded(delta: Delta, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in_features) and B (rows, r), padded with zeros."""
    missing = r - len(delta.a)
    return nn.functional.pad(delta.a, (0, 0, 0, missing)), nn.functional.pad(delta.b, (0, missing))


def tensors_of(deltas: Mapping[str, Delta], r: int, names: Aliases) -> dict[str, torch.Tensor]:
    tensors, stacks = {}, defaultdict[str, dict](dict)
    for module, delta in deltas.items():
        a, b = padded(delta, r)
        stack, expert = names.stacked(f"{module}.weight")
        if expert is not None:
            stacks[stack][expert] = a, b
            continue
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
        if delta.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = delta.magnitude
    for stack, experts in stacks.items():
        all_a, all_b = zip(*(experts[i] for i in range(len(experts))))
        module, _, leaf = stack.rpartition(".")
        module += ".base_layer" * (leaf == "gate_up_proj")  # `peft` wraps it first
        tensors[f"{module}.lora_A.weight"] = torch.cat(all_a)
        tensors[f"{module}.lora_B.weight"] = torch.stack(all_b, -1).flatten(1)  # the expert changes fastest
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


def targets(adapted: set[str], model: GPT, names: WeightMap, r: int, alpha: float) -> dict[str, Any]:
    """The fields that select exactly these modules. `peft` takes the names of experts' modules for the stacks of all
    layers, in most families, and would take dense MLPs for them too. So dense MLPs are named as parameters, and so are
    stacks if only some layers have an update. These then have the rank that the fused updates of their parts have."""
    experts = {module for module in adapted if EXPERT.search(module)}
    dense = {module for module in adapted - experts if model.config.n_expert and ".mlp." in module}
    modules = {*target_modules(adapted - experts - dense, model, names)}
    parameters, patterns = {f"{module}.weight" for module in dense}, {}
    stored = {form.module for parameter in names.parameters(model).values() for form in parameter.stored}
    layers, every = ({EXPERT.split(m)[0] for m in found if EXPERT.search(m)} for found in (experts, stored))
    own = aliases(model.config.model_type)
    if layers == every and own.in_peft and not own.in_files:
        modules |= {module.rpartition(".")[2] for module in experts}
    else:
        for end, parts in own.stacks.items():
            parameters |= {in_memory(model, layer + end) for layer in layers}
            if layers and len(parts) > 1:
                key = rf".*\.{end.rpartition('.')[2]}"
                patterns = {"rank_pattern": {key: r * len(parts)}, "alpha_pattern": {key: alpha * len(parts)}}
    return {"target_modules": sorted(modules), "target_parameters": sorted(parameters) or None, **patterns}


def target_modules(adapted: set[str], model: GPT, names: WeightMap) -> list[str]:
    """The `target_modules` that select exactly these modules: the last parts of their names if these are enough."""
    if names.kept.pattern != MTP:  # parts of the model that transformers runs and litgpt does not may have these names
        return sorted(adapted)
    linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    every = {in_memory(model, hf.module) for name in linears for hf in names.stored(name)}
    leaves = {module.rpartition(".")[2] for module in adapted}
    same_leaf = {hf for hf in every if hf.rpartition(".")[2] in leaves}
    return sorted(leaves if same_leaf == adapted else adapted)
