"""LoRA in PEFT's form: a folder with `adapter_config.json` and `adapter_model.safetensors`, or `adapter_model.bin`.

The names are those of `peft` (https://github.com/huggingface/peft): `base_model.model.` before the Hugging Face module,
`lora_A.weight` (r, in_features), `lora_B.weight` (out_features, r) and, for DoRA, `lora_magnitude_vector`
(out_features,) behind it. LoRA of an embedding has `lora_embedding_A` (r, tokens) and `lora_embedding_B` (width, r). A
module that is trained in full stands there with its `weight`; of an embedding with some trained tokens, their rows do.
Experts have modules of their own in adapters from before transformers 5; since then an adapter holds them stacked.

This is the reading; `litgpt.methods.peft_export` writes.
"""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from litgpt.checkpoint.folder import Overlaid, opened
from litgpt.errors import UserError
from litgpt.families import aliases, weight_map
from litgpt.families.table import Stored
from litgpt.families.weights import Weights
from litgpt.methods.lora import LoRA, lora_layers
from litgpt.model import GPT
from litgpt.model.config import Config
from litgpt.model.mlp import Router
from litgpt.storage.fields import pattern
from litgpt.storage.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLED = "adapter_model.bin"  # as older ones are stored
TOKENS = ".token_adapter.trainable_tokens_delta"
Edits = dict[str, Callable[[torch.Tensor], torch.Tensor]]
MUST_BE: dict[str, tuple] = {  # what changes the math: the values that leave it as it is, or that are implemented
    "bias": ("none", "all", "lora_only"),
    "layer_replication": ([],),
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

    def to(self, device: torch.device) -> "Delta":
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return Delta(self.a.to(device), self.b.to(device), self.scale, magnitude)

    def rows_split(self, stored: Stored, sizes: Sequence[int]) -> list["Delta"]:
        """The update of each of our blocks that a module holds."""
        order = torch.arange(len(self.b)) if stored.rows is None else stored.rows.argsort()
        norms = [None] * len(sizes) if self.magnitude is None else self.magnitude[order].split(list(sizes))
        return [Delta(self.a, b, self.scale, m) for b, m in zip(self.b[order].split(list(sizes)), norms)]

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """In float32."""
        merged = weight.float() + self.scale * (self.b @ self.a)
        return merged if self.magnitude is None else merged * (self.magnitude / merged.norm(dim=1))[:, None]


def fused_delta(blocks: Mapping[int, tuple[torch.Tensor, torch.Tensor]], sizes: Sequence[int], scale: float) -> Delta:
    """One update for all blocks of a layer, of the ranks of the adapted blocks together: its B is block-diagonal.

    Args:
        blocks: The A and B of each adapted block, by its number.
        sizes: The rows of every block.
    """
    a = torch.cat([a for a, _ in blocks.values()])
    b = a.new_zeros(sum(sizes), len(a))
    column = 0
    for i, (_, own) in blocks.items():
        row = sum(sizes[:i])
        b[row : row + sizes[i], column : column + own.size(1)] = own
        column += own.size(1)
    return Delta(a, b, scale)


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
        self.file, self.shapes = weights_file(folder), read_shapes(folder)
        self.tokens = fields.get("trainable_token_indices") or []
        self.copied = fields.get("modules_to_save") or []
        self.tying = bool(fields.get("ensure_weight_tying")) and any(  # where peft knows the name of an embedding
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
        return f"{kind} of rank {self.highest}" + (", and whole weights" if self.in_full else "")

    @property
    def in_full(self) -> list[str]:
        """The names in the file of what changes weights of the base themselves, not only the output of a layer."""
        return [n for n in self.shapes if ".lora_" not in n or ".lora_embedding_" in n]

    def apply(self, model: GPT) -> None:
        """Make room for the adapter in a model on the meta device."""
        places = self.places(model.config)
        ranks = [p.r for several in places.values() for p in several]
        lora = LoRA(
            r=max(ranks, default=self.r),  # a rank pattern shows in the shapes
            alpha=self.alpha,
            dropout=0.0,
            variant="dora" if self.dora else "lora",
            modules=frozenset(p.module for several in places.values() for p in several),
        )
        lora.scaling = self.scale("", self.r) or 1.0  # where a module has another, its B makes up for it
        lora.apply(model)

    def scale(self, module: str, r: int) -> float:
        """Of one module."""
        matching = (alpha for name, alpha in self.alphas.items() if name.match(module))
        alpha = next(matching, self.alpha)
        return alpha / (math.sqrt(r) if self.rslora else r)

    def places(self, config: Config) -> dict[str, list["AdapterSlice"]]:
        """For each module of the adapter what of the model it updates."""
        names = aliases(config.model_type)
        places = {}
        for name, shape in self.shapes.items():
            module, found, _ = name.partition(".lora_A.")
            if found:
                whole = AdapterSlice(names.rename(f"{module}.weight").removesuffix(".weight"), module, shape[0])
                rows = self.shapes.get(f"{module}.lora_B.weight", ())
                places[module] = stack_places(module, shape, rows, config) or [whole]
        return places

    def deltas(self, config: Config) -> dict[str, Delta]:
        """What was learned, by Hugging Face module in the words of the family's table, in float32.

        Raises:
            UserError: an A without its B, or a tensor with a name that is not LoRA's.
        """
        found = self.factors(of_embeddings=False)
        deltas = {}
        for module, places in self.places(config).items():
            t = found[module]
            for p in places:
                a, b = t["A.weight"][p.rows_of_a], t["B.weight"][p.rows, p.columns]
                deltas[p.module] = Delta(a, b, self.scale(p.target, p.r), t.get("magnitude_vector"))
        return deltas

    def factors(self, of_embeddings: bool) -> dict[str, dict[str, torch.Tensor]]:
        """LoRA's tensors by module and by the end of their name, in float32: of linear layers, or of embeddings.

        Raises:
            UserError: one of a module's tensors is missing, or has a name that is not LoRA's.
        """
        embeddings = {name.partition(".lora_embedding_")[0] for name in self.shapes if ".lora_embedding_" in name}
        found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        with opened(self.file) as f:
            for name in self.shapes:
                module, lora, leaf = name.rpartition(".lora_")
                if lora and (module in embeddings) == of_embeddings:
                    found[module][leaf] = f.get_tensor(PREFIX + name).float()
        wanted = {"embedding_A", "embedding_B"} if of_embeddings else {"A.weight", "B.weight"}
        wanted |= {"magnitude_vector"} if self.dora else set()
        wrong = sorted(m for m, tensors in found.items() if set(tensors) != wanted)
        if wrong:
            leaves = " or ".join(f"lora_{leaf.partition('.')[0]}" for leaf in sorted(wanted))
            raise UserError(f"{self.file} lacks {leaves} for: {', '.join(wrong)}.")
        return found

    def over(self, base: Weights) -> Weights:
        """The base with what the adapter has in place of its weights: whole weights, embeddings with an update, and
        embeddings of which some tokens were trained.

        Raises:
            UserError: they do not go together, or do not fit the base.
        """
        if not self.in_full:
            return base
        config, names = base.config, weight_map(base.config)
        weights, shared = self.whole_weights(config)
        edits, tokens = self.updated_embeddings(config), self.trained_tokens(config)
        wte, head = names.embedding, names.head
        if config.tie_embeddings and not {wte, head}.isdisjoint((*weights, *edits, *tokens)):
            # `shared`: what both have in common; in `modules_to_save` are copies, one for each
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
                f"With {self.file} the embedding and the head of {base.folder} would be for "
                f"{' and '.join(map(str, sorted(sizes)))} tokens. Save the adapter with save_embedding_layers=True, so "
                "that it has all of one size."
            )
        return Overlaid(base, weights, replace(config, padded_vocab_size=sizes.pop(), tie_embeddings=tied))

    def whole_weights(self, config: Config) -> tuple[dict[str, torch.Tensor], set[str]]:
        """The weights that take the place of the base's, by their Hugging Face names in the words of the table; and the
        names of those that are not copies for this adapter alone (`modules_to_save`), but the base's own parameters."""
        weights, shared = {}, set()
        with opened(self.file) as f:
            for stored in self.in_full:
                if re.search(r"\.lora_|\.(original_module|modules_to_save)\.|" + re.escape(TOKENS), stored):
                    continue  # what `modules_to_save` names stands under the module's own name as well
                own = re.sub(r"\.token_adapter\b|\.base_layer\b", "", stored)  # of a layer with an update
                module = own.rpartition(".")[0]
                for name, _, index in aliases(config.model_type).expand(own, self.shapes[stored]):
                    view = f.get_slice(PREFIX + stored)
                    weights[name] = f.get_tensor(PREFIX + stored) if index is None else view[index]
                    if own != stored or not any(is_end(str(end), module) for end in self.copied):
                        shared.add(name)
        return weights, shared

    def updated_embeddings(self, config: Config) -> Edits:
        """How the weight of each embedding with an update is made from the base's, by its name in the table."""
        edits: Edits = {}
        for module, t in self.factors(of_embeddings=True).items():
            a, b = t["embedding_A"], t["embedding_B"]
            delta = Delta(a, b, self.scale(module, len(a)), t.get("magnitude_vector"))
            edits[aliases(config.model_type).rename(f"{module}.weight")] = partial(updated_embedding, delta)
        return edits

    def trained_tokens(self, config: Config) -> Edits:
        """How the weight of each module with some trained tokens is made from the base's, by its name in the table.

        Raises:
            UserError: `trainable_token_indices` does not say which tokens they are.
        """
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
        """Fill what `apply` made room for.

        Raises:
            UserError: modules or shapes that the model does not have; all of them at once.
        """
        names, deltas = weight_map(model.config), self.deltas(model.config)
        wrong = []
        for name, layer in lora_layers(model).items():
            adapted = {i: (a, b) for i, a, b in layer.blocks()}
            magnitudes = layer.magnitude.split(layer.adapted_sizes) if layer.magnitude is not None else ()
            magnitude = dict(zip(adapted, magnitudes))
            stored_modules = names.stored(name)
            sizes = layer.sizes if len(stored_modules) > 1 else [sum(layer.sizes)]
            for block, (stored, size) in enumerate(zip(stored_modules, sizes)):
                if stored.module not in deltas:
                    continue
                delta = deltas.pop(stored.module)
                if delta.shape != (size, layer.linear.in_features):
                    wrong.append(f"{stored.module} {delta.shape}")
                    continue
                own = list(adapted) if size == sum(layer.sizes) else [block]
                for i, part in zip(own, delta.rows_split(stored, [len(adapted[i][1]) for i in own])):
                    a, b = adapted[i]
                    r = len(part.a)
                    a.zero_()[:r] = part.a  # a lower rank is filled up with zeros
                    b.zero_()[:, :r] = part.b * (part.scale / layer.lora.scaling)
                    if part.magnitude is not None:
                        magnitude[i].copy_(part.magnitude)
        wrong += self.add_to_routers(model, deltas)
        if wrong:
            raise UserError(f"The adapter in {self.folder} does not fit the model: {'; '.join(wrong)}.")

    def add_to_routers(self, model: GPT, deltas: dict[str, Delta]) -> list[str]:
        """Add updates of routers to their weights, as `peft` does; returns modules that the model does not have."""
        names = weight_map(model.config)
        parameters = names.parameters(model)
        wrong, left_out = [], []
        for module, delta in sorted(deltas.items()):
            found = parameters.get(names.find_parameter(f"{module}.weight"))
            router = found and found.module
            if isinstance(router, Router) and delta.shape == tuple(router.weight.shape):
                router.weight.copy_(delta.to(router.weight.device).added_to(router.weight))
            elif names.kept.search(f"{module}.weight"):
                left_out.append(module)
            else:
                wrong.append(module)
        if left_out:
            print(
                f"litgpt: {self.folder} also updates {len(left_out)} modules of a part that is not run here, like "
                f"{left_out[0]}; merge_lora merges them.",
                file=sys.stderr,
            )
        return wrong


class AdapterSlice(NamedTuple):
    """What of an adapter's A and B updates one Hugging Face module.

    Args:
        module: Its name in the words of the family's table.
        target: The name that `peft` looks up in its patterns.
        r: The rank: as many rows of A and columns of B.
    """

    module: str
    target: str
    r: int
    rows_of_a: slice = slice(None)
    rows: slice = slice(None)
    columns: slice = slice(None)


def stack_places(module: str, a: tuple[int, ...], b: tuple[int, ...], config: Config) -> list[AdapterSlice]:
    """The places of an update of stacked experts; none if this is something else.

    Which of the two stacks it is does not show in the name, but in the shapes: a name has `base_layer` where the module
    is wrapped for both. In A the experts lie one below the other; in B the expert counts fastest.

    Args:
        a: The shape of A, (experts * r, in_features).
        b: The shape of B, (rows, r * experts).
    """
    stem, n = re.sub(r"(\.base_layer)+$", "", module), config.n_expert
    if not stem.endswith(".experts") or not n or a[0] % n or len(a) != 2 or len(b) != 2:
        return []
    width, size = config.n_embd, config.moe_intermediate_size or config.intermediate_size
    assert size is not None
    for end, parts in aliases(config.model_type).stacks.items():
        wanted = (2 * size, width) if len(parts) == 2 else (width, size)
        if (b[0], a[1]) == wanted:
            target, r = stem.removesuffix(".experts") + end, a[0] // n
            places = []
            for name, _, index in aliases(config.model_type).expand(target, (n, *wanted)):
                e, rows = index or (0, slice(None))
                own = slice(e * r, (e + 1) * r)
                places.append(AdapterSlice(name.removesuffix(".weight"), target, r, own, rows, slice(e, None, n)))
            return places
    return []


def updated_embedding(delta: Delta, weight: torch.Tensor) -> torch.Tensor:
    """An embedding (tokens, width) with its update, whose A and B are those of (width, tokens). In float32.

    Raises:
        UserError: they are for another number of tokens, or for another width.
    """
    if delta.a.dim() != 2 or delta.b.dim() != 2 or delta.shape != tuple(weight.shape)[::-1]:
        raise UserError(f"its update has an A {tuple(delta.a.shape)} and a B {tuple(delta.b.shape)}")
    return delta.added_to(weight.T).T


def with_rows(ids: list[int], rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A weight with other rows for these tokens.

    Raises:
        UserError: it does not have these tokens, or has rows of another width.
    """
    if not all(0 <= i < len(weight) for i in ids) or rows.shape != (len(ids), *weight.shape[1:]):
        raise UserError(f"its trained tokens are {ids}, with weights {tuple(rows.shape)}")
    return weight.index_copy(0, torch.tensor(ids), rows.to(weight.dtype))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights hold the same numbers, maybe in other types."""
    return a is b or (a.shape == b.shape and torch.equal(a.float(), b.float()))


def is_end(end: str, module: str) -> bool:
    return module == end or module.endswith(f".{end}")


def weights_file(folder: Path) -> Path:
    """The file of an adapter's tensors: safetensors, or one of `torch.save`. Raises `UserError` if there is none."""
    file = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {WEIGHTS} and no {PICKLED}.")
    return file


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in an adapter's file, by name without PEFT's prefix.

    Raises:
        UserError: the file is missing, or cut short.
    """
    with opened(weights_file(folder)) as f:
        return {name.removeprefix(PREFIX): tuple(f.get_slice(name).get_shape()) for name in sorted(f.keys())}


def read_fields(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a folder. Raises `UserError` if it is damaged."""
    return read_json(folder / CONFIG)
