"""Reads LoRA in PEFT's format: `adapter_config.json` with `adapter_model.safetensors` or `adapter_model.bin`.

Tensors have the names of `peft` (https://github.com/huggingface/peft): `base_model.model.`, the Hugging Face module and

- for a linear layer `lora_A.weight` (r, in_features), `lora_B.weight` (out_features, r) and, with DoRA,
  `lora_magnitude_vector` (out_features,);
- for an embedding `lora_embedding_A` (r, tokens) and `lora_embedding_B` (width, r);
- for a fully trained module its `weight`, and for trained tokens of an embedding their rows.

Adapters from before transformers 5 have a module for each expert. Since then the experts are stacked.
"""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from litgpt.checkpoint.folder import Overlaid, opened
from litgpt.errors import UserError
from litgpt.families import aliases, weight_map
from litgpt.families.weights import Weights
from litgpt.methods.deltas import Delta, adapted_modules, fill
from litgpt.methods.lora import LoRA
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.mlp import Router
from litgpt.storage.fields import pattern

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLED = "adapter_model.bin"  # in older folders
TOKENS = ".token_adapter.trainable_tokens_delta"
COPIES = r"\.(original_module|modules_to_save)\."  # in the names of weights that the file has by another name too
Edits = dict[str, Callable[[torch.Tensor], torch.Tensor]]
SUPPORTED: dict[str, tuple] = {  # values of the fields that change the math
    "bias": ("none", "all", "lora_only"),
    "layer_replication": ([],),
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


class LoRAFolder:
    """A LoRA folder in PEFT's format. Raises `UserError` if it is damaged, or a field has an unsupported value."""

    copied: Sequence[str] = ()  # the ends of the names of fully trained modules
    trains_biases = False

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.folder = folder
        for key, allowed in SUPPORTED.items():
            if fields.get(key) and fields[key] not in allowed:
                raise UserError(f"{folder / CONFIG} has {key} {fields[key]!r}, which is not supported.")
        self.base = str(fields.get("base_model_name_or_path") or "")
        self.file, self.shapes = read_shapes(folder)
        self.tokens = fields.get("trainable_token_indices") or []
        self.copied = fields.get("modules_to_save") or []
        self.trains_biases = (fields.get("bias") or "none") != "none"
        self.tying = bool(fields.get("ensure_weight_tying")) and any(  # if peft recognizes the name of an embedding
            str(name).rpartition(".")[2] in ("embed_tokens", "lm_head") for name in self.copied
        )
        self.dora, self.rslora = bool(fields.get("use_dora")), bool(fields.get("use_rslora"))
        alphas, ranks = fields.get("alpha_pattern") or {}, fields.get("rank_pattern") or {}
        try:
            self.r, self.alpha = int(fields["r"]), float(fields["lora_alpha"])
            self.highest = max([self.r, *ranks.values()])
        except (KeyError, TypeError) as e:
            raise UserError(f"{folder / CONFIG} has no usable r and lora_alpha.") from e
        try:  # peft matches the end of a module's name with them
            self.alphas = {pattern(name, r"(.*\.)?({})$"): float(alpha) for name, alpha in alphas.items()}
        except ValueError as e:
            raise UserError(f"{folder / CONFIG}: alpha_pattern: {e}.") from e

    @property
    def description(self) -> str:
        kind = "DoRA" if self.dora else "LoRA"
        return f"{kind} of rank {self.highest}" + (", and fully trained weights" if self.in_full else "")

    @property
    def in_full(self) -> list[str]:
        """The tensors that change weights of the base themselves, not only the output of a layer."""
        return [n for n in self.shapes if ".lora_" not in n or ".lora_embedding_" in n]

    def apply(self, model: GPT) -> None:
        self.lora(model.config).apply(model)

    def lora(self, config: Config, **options: Any) -> LoRA:
        """The layers of the adapter. `options` are those of `LoRA` that the folder does not determine."""
        places = self.places(config)
        r = max((p.r for several in places.values() for p in several), default=self.r)  # reflects the rank pattern
        scale = self.scale("", self.r) or 1.0  # `fill` rescales the B of modules with another scale
        lora = LoRA(
            r=r,
            alpha=scale * r,
            variant="dora" if self.dora else "lora",
            modules=frozenset(p.module for several in places.values() for p in several),
            **{"dropout": 0.0, **options},
        )
        lora.scaling = scale
        return lora

    def to_train(self, weights: Weights, **options: Any) -> LoRA:
        """The layers of the adapter, to train them further. `weights` are those of `over`; `options` as for `lora`."""
        replaced = weights.replaced if isinstance(weights, Overlaid) else {}
        in_full = {name: self.trains(name, weights.config) for name in replaced}
        return self.lora(weights.config, in_full=in_full, **options)

    def trains(self, name: str, config: Config) -> bool:
        """Whether a weight that the file has in full was trained. `peft` also stores an embedding and a head that were
        only resized."""
        names, in_memory = weight_map(config), aliases(config.model_type).in_memory
        module, _, leaf = in_memory(name).rpartition(".")
        if module not in [in_memory(other).rpartition(".")[0] for other in (names.embedding, names.head)]:
            return True
        return any(is_end(str(end), module) for end in self.copied) or (leaf == "bias" and self.trains_biases)

    def check_trainable(self, model: GPT) -> None:
        """Raise `UserError` if the trained weights of a model, to which `to_train` was applied, lack a part of the
        adapter, or do not fit it."""
        names, modules = weight_map(model.config), set[str]()
        for places in self.places(model.config).values():
            modules |= {place.module for place in places}
        parameters = names.parameters(model)
        wrong = [m for m in modules if not names.find(m)[0] and not names.kept.search(f"{m}.weight")]
        if wrong:
            raise UserError(f"The adapter in {self.folder} does not fit the model: {', '.join(sorted(wrong))}.")
        left = modules - adapted_modules(model)  # routers, and parts of the model that litgpt does not run
        left |= {m for m in modules if self.dora and model.config.n_expert and re.search(r"\.(mlp|experts)\.", m)}
        for name in (name for name in self.in_full if not re.search(COPIES, name)):
            own = aliases(model.config.model_type).rename(re.sub(r"\.(base_layer|token_adapter)\b", "", name))
            if ".lora_" in name or name.endswith(TOKENS) or names.find_parameter(own) not in parameters:
                left.add(name.partition(".lora_")[0].removesuffix(TOKENS))
        if left:
            raise UserError(
                f"{self.folder} changes {sorted(left)[0]} in a way that cannot be trained further. Merge the adapter "
                f"and train the result: litgpt merge_lora {self.folder}"
            )

    def scale(self, module: str, r: int) -> float:
        """The scale of the update of one module."""
        matching = (alpha for name, alpha in self.alphas.items() if name.match(module))
        alpha = next(matching, self.alpha)
        return alpha / (math.sqrt(r) if self.rslora else r)

    def places(self, config: Config) -> dict[str, list["AdapterSlice"]]:
        """For each module of the adapter, the Hugging Face modules that it updates."""
        names = aliases(config.model_type)
        places = {}
        for name, shape in self.shapes.items():
            module, found, _ = name.partition(".lora_A.")
            if found:
                all_of_it = AdapterSlice(names.rename(f"{module}.weight").removesuffix(".weight"), module, shape[0])
                rows = self.shapes.get(f"{module}.lora_B.weight", ())
                places[module] = stack_slices(module, shape, rows, config) or [all_of_it]
        return places

    def deltas(self, config: Config) -> dict[str, Delta]:
        """The updates in float32, by Hugging Face module under the names of the family's table. Raises as `factors`."""
        found = self.factors(of_embeddings=False)
        deltas = {}
        for module, places in self.places(config).items():
            t = found[module]
            for p in places:
                a, b = t["A.weight"][p.rows_of_a], t["B.weight"][p.rows, p.columns]
                deltas[p.module] = Delta(a, b, self.scale(p.target, p.r), t.get("magnitude_vector"))
        return deltas

    def factors(self, of_embeddings: bool) -> dict[str, dict[str, torch.Tensor]]:
        """The LoRA tensors of linear layers, or of embeddings, in float32: by module, then by the end of the name.
        Raises `UserError` if a tensor of a module is missing, or has an unknown name."""
        embeddings = {name.partition(".lora_embedding_")[0] for name in self.shapes if ".lora_embedding_" in name}
        found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        with opened(self.file) as f:
            for name in self.shapes:
                module, lora, leaf = name.rpartition(".lora_")
                if lora and (module in embeddings) == of_embeddings:
                    found[module][leaf] = f.get_tensor(PREFIX + name).float()
        expected = {"embedding_A", "embedding_B"} if of_embeddings else {"A.weight", "B.weight"}
        expected |= {"magnitude_vector"} if self.dora else set()
        wrong = sorted(m for m, tensors in found.items() if set(tensors) != expected)
        if wrong:
            leaves = " or ".join(f"lora_{leaf.partition('.')[0]}" for leaf in sorted(expected))
            raise UserError(f"{self.file} lacks {leaves} for: {', '.join(wrong)}.")
        return found

    def over(self, base: Weights) -> Weights:
        """The base, with those weights replaced that the adapter trained in full, and the embeddings that it updates.
        Raises `UserError` if they do not fit each other or the base."""
        if not self.in_full:
            return base
        config, names = base.config, weight_map(base.config)
        weights, shared = self.full_weights(config)
        edits, tokens = self.updated_embeddings(config), self.trained_tokens(config)
        wte, head = names.embedding, names.head
        if config.tie_embeddings and not {wte, head}.isdisjoint((*weights, *edits, *tokens)):
            # `modules_to_save` has a copy for each of the two, `shared` a weight for both
            common = next((weights[name] for name in (head, wte) if name in shared), None)
            if self.tying:
                common = next((weights[name] for name in (wte, head) if name in weights), common)
            for name in (wte, head):
                if name not in weights:
                    weights[name] = base.tensor(wte) if common is None else common
            if wte in tokens:
                tokens.setdefault(head, tokens[wte])
        for name, edit in (edits | tokens).items():
            if name not in weights and name not in base.files:
                raise UserError(f"{self.file} updates {name}, which {base.folder} does not have.")
            weight = weights[name] if name in weights else base.tensor(name)
            try:
                weights[name] = edit(weight)
            except UserError as e:
                raise UserError(f"{self.file} does not fit {name} {tuple(weight.shape)}: {e}.") from e
        tied = config.tie_embeddings and (head not in weights or same(weights[head], weights[wte]))
        if tied:
            weights.pop(head, None)
        shapes = base.shapes | {name: tuple(weight.shape) for name, weight in weights.items()}
        of_tokens = (wte, *([] if tied else [head]), f"{head.removesuffix('.weight')}.bias")
        sizes = {size for name in of_tokens for size in shapes.get(name, ())[:1]}
        if len(sizes) > 1:
            raise UserError(
                f"With {self.file} the embedding and the head of {base.folder} have different sizes: "
                f"{' and '.join(map(str, sorted(sizes)))} tokens. Save the adapter with save_embedding_layers=True."
            )
        if config.per_layer_embedding and sizes != {config.padded_vocab_size}:
            raise UserError(f"{self.file} changes the number of tokens, and {base.folder} has embeddings per layer.")
        return Overlaid(base, weights, replace(config, padded_vocab_size=sizes.pop(), tie_embeddings=tied))

    def full_weights(self, config: Config) -> tuple[dict[str, torch.Tensor], set[str]]:
        """The fully trained weights, by Hugging Face name under the names of the table, and the names of those that are
        parameters of the base itself, not copies for this adapter (`modules_to_save`)."""
        weights, shared = {}, set()
        with opened(self.file) as f:
            for stored in self.in_full:
                if re.search(rf"\.lora_|{COPIES}|" + re.escape(TOKENS), stored):
                    continue  # `modules_to_save` are in the file under the module's own name as well
                own = re.sub(r"\.token_adapter\b|\.base_layer\b", "", stored)  # of a layer with an update
                module = own.rpartition(".")[0]
                for name, _, index in aliases(config.model_type).expand(own, self.shapes[stored]):
                    view = f.get_slice(PREFIX + stored)
                    weights[name] = f.get_tensor(PREFIX + stored) if index is None else view[index]
                    if own != stored or not any(is_end(str(end), module) for end in self.copied):
                        shared.add(name)
        return weights, shared

    def updated_embeddings(self, config: Config) -> Edits:
        """How to make each embedding with an update from the base's, by its name in the table."""
        edits: Edits = {}
        for module, t in self.factors(of_embeddings=True).items():
            a, b = t["embedding_A"], t["embedding_B"]
            delta = Delta(a, b, self.scale(module, len(a)), t.get("magnitude_vector"))
            edits[aliases(config.model_type).rename(f"{module}.weight")] = partial(updated_embedding, delta)
        return edits

    def trained_tokens(self, config: Config) -> Edits:
        """How to make each weight with trained tokens from the base's, by its name in the table. Raises `UserError` if
        `trainable_token_indices` does not list the tokens."""
        edits: Edits = {}
        with opened(self.file) as f:
            for name in (name for name in self.shapes if name.endswith(TOKENS)):
                module, ids = name.removesuffix(TOKENS), self.tokens
                if isinstance(ids, dict):
                    ids = next((ids[key] for key in ids if is_end(str(key), module)), None)
                if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                    raise UserError(
                        f"{self.folder / CONFIG} has trainable_token_indices {self.tokens!r}, which does not list the "
                        f"tokens that {self.file.name} has for {module}."
                    )
                rows = f.get_tensor(PREFIX + name)
                edits[aliases(config.model_type).rename(f"{module}.weight")] = partial(with_rows, ids, rows)
        return edits

    @torch.no_grad()
    def load_into(self, model: GPT) -> None:
        """Fill the layers that `apply` added, and add updates of routers to their weights, as `peft` does. Raises one
        `UserError` for all modules that do not fit the model."""
        deltas = self.deltas(model.config)
        wrong = fill(model, deltas)
        names, skipped = weight_map(model.config), []
        parameters = names.parameters(model)
        for module, delta in sorted(deltas.items()):
            found = parameters.get(names.find_parameter(f"{module}.weight"))
            router = found and found.module
            if isinstance(router, Router) and delta.shape == tuple(router.weight.shape):
                router.weight.copy_(delta.to(router.weight.device).added_to(router.weight))
            elif names.kept.search(f"{module}.weight"):
                skipped.append(module)
            else:
                wrong.append(module)
        if wrong:
            raise UserError(f"The adapter in {self.folder} does not fit the model: {'; '.join(wrong)}.")
        if skipped:
            print(
                f"litgpt: Skipped {len(skipped)} modules of {self.folder} in a part of the model that litgpt does not "
                f"run, such as {skipped[0]}. merge_lora merges them.",
                file=sys.stderr,
            )


class AdapterSlice(NamedTuple):
    """The part of an adapter's A and B that updates one Hugging Face module."""

    module: str  # its name in the family's table
    target: str  # the name that `peft` matches with its patterns
    r: int
    rows_of_a: slice = slice(None)
    rows: slice = slice(None)
    columns: slice = slice(None)


def expert_slices(expert: int, n_expert: int, r: int) -> tuple[slice, slice]:
    """The rows of A and the columns of B of one expert in a stack: (experts * r, in_features) and (rows, r * experts).
    In the columns of B the expert is the index that changes fastest."""
    return slice(expert * r, (expert + 1) * r), slice(expert, None, n_expert)


def stack_slices(module: str, a: tuple[int, ...], b: tuple[int, ...], config: Config) -> list[AdapterSlice]:
    """The slices of an update of stacked experts; empty for other modules. The shapes of A and B tell which of the two
    stacks it is. The name does not: `peft` wraps the module once for each stack, and calls what is inside `base_layer`.
    """
    stem, n = re.sub(r"(\.base_layer)+$", "", module), config.n_expert
    if not stem.endswith(".experts") or not n or a[0] % n or len(a) != 2 or len(b) != 2:
        return []
    width, size = config.n_embd, config.moe_intermediate_size or config.intermediate_size
    names = aliases(config.model_type)
    for end in names.stacks:
        shape = (2 * size, width) if "gate_up" in end else (width, size)
        if (b[0], a[1]) == shape:
            target, r, slices = stem.removesuffix(".experts") + end, a[0] // n, []
            for name, _, index in names.expand(target, (n, *shape)):
                expert, rows = index or (0, slice(None))
                rows_of_a, columns = expert_slices(expert, n, r)
                slices.append(AdapterSlice(name.removesuffix(".weight"), target, r, rows_of_a, rows, columns))
            return slices
    return []


def updated_embedding(delta: Delta, weight: torch.Tensor) -> torch.Tensor:
    """An embedding (tokens, width) with an update of its transpose, in float32. Raises `UserError` for wrong shapes."""
    if delta.a.dim() != 2 or delta.b.dim() != 2 or delta.shape != tuple(weight.shape)[::-1]:
        raise UserError(f"its update has an A {tuple(delta.a.shape)} and a B {tuple(delta.b.shape)}")
    return delta.added_to(weight.T).T


def with_rows(ids: list[int], rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A weight with the rows of these tokens replaced. Raises `UserError` if they do not fit."""
    if not all(0 <= i < len(weight) for i in ids) or rows.shape != (len(ids), *weight.shape[1:]):
        raise UserError(f"its trained tokens are {ids}, with weights {tuple(rows.shape)}")
    return weight.index_copy(0, torch.tensor(ids), rows.to(weight.dtype))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights have equal values, in whatever dtypes."""
    return a is b or (a.shape == b.shape and torch.equal(a.float(), b.float()))


def is_end(end: str, module: str) -> bool:
    return module == end or module.endswith(f".{end}")


def read_shapes(folder: Path) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """The file with an adapter's tensors, and their shapes by name without PEFT's prefix. Raises `UserError` if the
    file is missing or damaged."""
    file = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has neither {WEIGHTS} nor {PICKLED}.")
    with opened(file) as f:
        return file, {name.removeprefix(PREFIX): tuple(f.get_slice(name).get_shape()) for name in sorted(f.keys())}
