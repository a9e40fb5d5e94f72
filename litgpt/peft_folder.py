"""LoRA in PEFT's form: a folder with `adapter_config.json` and `adapter_model.safetensors`.

The names are those of `peft` (https://github.com/huggingface/peft): `base_model.model.` before the Hugging Face module,
`lora_A.weight` (r, in_features), `lora_B.weight` (out_features, r) and, for DoRA, `lora_magnitude_vector`
(out_features,) behind it. A module that is trained in full stands there with its `weight`. Experts have modules of
their own in adapters from before transformers 5; since then an adapter holds them stacked.

This is the reading; `litgpt.peft_export` writes.
"""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from litgpt.checkpoint import base_parameters, opened, stored_pieces
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.families import aliases, name_table
from litgpt.families.table import Stored
from litgpt.fields import pattern
from litgpt.files import read_json
from litgpt.lora import LoRA, lora_layers
from litgpt.model import GPT
from litgpt.model.mlp import Router

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MUST_BE = {  # what changes the math and is not implemented: the values that leave it as it is
    "bias": ("none",),
    "layer_replication": ([],),
    "trainable_token_indices": ([],),
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
        self.shapes = read_shapes(folder)
        embeddings = sorted({n.partition(".lora_")[0] for n in self.shapes if ".lora_embedding_" in n})
        if embeddings:
            raise UserError(f"{folder} has a LoRA of an embedding, {', '.join(embeddings)}, which is not supported.")
        self.tying = bool(fields.get("ensure_weight_tying"))
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
        """The names in the file of the weights that take the place of the base's."""
        return [n for n in self.shapes if ".lora_" not in n]

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

    def places(self, config: Config) -> dict[str, list["Place"]]:
        """For each module of the adapter what of the model it updates."""
        names = aliases(config.model_type)
        places = {}
        for name, shape in self.shapes.items():
            module, found, _ = name.partition(".lora_A.")
            if found:
                whole = Place(names.rename(f"{module}.weight").removesuffix(".weight"), module, shape[0])
                rows = self.shapes.get(f"{module}.lora_B.weight", ())
                places[module] = stack_places(module, shape, rows, config) or [whole]
        return places

    def deltas(self, config: Config) -> dict[str, Delta]:
        """What was learned, by Hugging Face module in the words of the family's table, in float32.

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
        for module, places in self.places(config).items():
            t = found[module]
            for p in places:
                a, b = t["A.weight"][p.rows_of_a], t["B.weight"][p.rows, p.columns]
                deltas[p.module] = Delta(a, b, self.scale(p.target, p.r), t.get("magnitude_vector"))
        return deltas

    def whole_weights(self, config: Config) -> dict[str, torch.Tensor]:
        """The weights that take the place of the base's, by their Hugging Face names in the words of the table."""
        weights = {}
        with opened(self.folder / WEIGHTS) as f:
            for stored in self.in_full:
                own = stored.replace(".base_layer.", ".")  # peft also writes the weight of a head that it updates
                for name, _, index in aliases(config.model_type).expand(own, self.shapes[stored]):
                    view = f.get_slice(PREFIX + stored)
                    weights[name] = f.get_tensor(PREFIX + stored) if index is None else view[index]
        return weights

    @torch.no_grad()
    def load_into(self, model: GPT) -> None:
        """Fill what `apply` made room for.

        Raises:
            UserError: modules or shapes that the model does not have; all of them at once.
        """
        table, deltas = name_table(model.config), self.deltas(model.config)
        wrong = []
        for name, layer in lora_layers(model).items():
            adapted = {i: (a, b) for i, a, b in layer.blocks()}
            magnitudes = layer.magnitude.split(layer.adapted_sizes) if layer.magnitude is not None else ()
            magnitude = dict(zip(adapted, magnitudes))
            for block, (stored, size) in enumerate(table.pieces(name, layer.sizes)):
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
        wrong += self.put_whole_weights(model)
        if wrong:
            raise UserError(f"The adapter in {self.folder} does not fit the model: {'; '.join(wrong)}.")

    def add_to_routers(self, model: GPT, deltas: dict[str, Delta]) -> list[str]:
        """Add updates of routers to their weights, as `peft` does; returns modules that the model does not have."""
        table, slots = name_table(model.config), base_parameters(model)
        wrong, left_out = [], []
        for module, delta in sorted(deltas.items()):
            router = slots.get(f"{(table.from_hf(module) or ('',))[0]}.weight", (None, ""))[0]
            if isinstance(router, Router) and delta.shape == tuple(router.weight.shape):
                router.weight.copy_(delta.to(router.weight.device).added_to(router.weight))
            elif table.kept.search(f"{module}.weight"):
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

    def put_whole_weights(self, model: GPT) -> list[str]:
        """Replace the base's weights by the adapter's; returns those that the model does not have."""
        table, slots, wrong = name_table(model.config), base_parameters(model), []
        given = self.whole_weights(model.config)
        self.check_tied(given, model)
        for name, weight in given.items():
            ours, part = table.from_hf(name.rpartition(".")[0]) or ("", 0)
            if ours == "lm_head" and model.config.tie_embeddings and name.endswith(".weight"):
                ours = "transformer.wte"
            ours = f"{ours}.{name.rpartition('.')[2]}"
            module, leaf = slots.get(ours, (None, ""))
            if module is None:
                if not table.kept.search(name):
                    wrong.append(name)
                continue
            _, stored, rows = stored_pieces(table, ours, module, leaf)[part]
            if stored.shape(rows.shape) == tuple(weight.shape):
                rows.copy_(stored.to_ours(weight))
            else:
                wrong.append(f"{name} {tuple(weight.shape)}")
        return wrong

    def check_tied(self, given: dict[str, torch.Tensor], model: GPT) -> None:
        """Raise `UserError` where the adapter tears a tied head from its embedding."""
        table, shared = name_table(model.config), model.transformer.wte.weight
        (head,), (embedding,) = table.to_hf("lm_head"), table.to_hf("transformer.wte")
        pair = [t for t in (given.get(f"{head}.weight"), given.get(f"{embedding}.weight")) if t is not None]
        if not model.config.tie_embeddings or not pair or (self.tying and len(pair) == 1):
            return
        other = pair[1] if len(pair) == 2 else shared.cpu()
        if not torch.equal(pair[0].to(other.dtype), other):
            raise UserError(
                f"The adapter in {self.folder} holds an embedding and a head that differ, but the model has one weight "
                "for both (tie_word_embeddings): this is not supported."
            )


class Place(NamedTuple):
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


def stack_places(module: str, a: tuple[int, ...], b: tuple[int, ...], config: Config) -> list[Place]:
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
                places.append(Place(name.removesuffix(".weight"), target, r, own, rows, slice(e, None, n)))
            return places
    return []


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
    """The `adapter_config.json` of a folder. Raises `UserError` if it is damaged."""
    return read_json(folder / CONFIG)
