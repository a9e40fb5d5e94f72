"""Low-rank updates by Hugging Face module: the form between the LoRA layers of a model and the files of an adapter.

A layer of ours may be fused from several blocks of rows (q, k and v; gate and up). Hugging Face has a module for each
block, or one for all of them, whose rows may be in another order. `to_modules` and `fill` map in the two directions.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from litgpt.families import weight_map
from litgpt.families.table import WeightMap
from litgpt.methods.lora import LoRALinear, lora_layers
from litgpt.methods.quantize import full_weight
from litgpt.model.gpt import GPT


@dataclass
class Delta:
    """An update of a weight W (rows, in_features): W + scale b a, with rows rescaled to the norms `magnitude`."""

    a: torch.Tensor  # (r, in_features), float32
    b: torch.Tensor  # (rows, r), float32
    scale: float
    magnitude: Optional[torch.Tensor] = None  # for DoRA, (rows,)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.b), self.a.size(1)

    def to(self, device: torch.device) -> "Delta":
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return Delta(self.a.to(device), self.b.to(device), self.scale, magnitude)

    def ordered(self, rows: Optional[torch.Tensor]) -> "Delta":
        """The update of these rows, in this order; None for all as they are."""
        if rows is None:
            return self
        rows = rows.to(self.b.device)
        return Delta(self.a, self.b[rows], self.scale, None if self.magnitude is None else self.magnitude[rows])

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        merged = weight.float() + self.scale * (self.b @ self.a)
        return merged if self.magnitude is None else merged * (self.magnitude / merged.norm(dim=1))[:, None]


def fused(blocks: Mapping[int, Delta], sizes: Sequence[int], norms: Optional[torch.Tensor] = None) -> Delta:
    """One update of all blocks, with the sum of their ranks and a block-diagonal B.

    Args:
        blocks: Updates by the number of the block. All have the same scale.
        sizes: The rows of every block.
        norms: For DoRA, the norm of every row of the weight. A row without an update keeps it.
    """
    a = torch.cat([delta.a for delta in blocks.values()])
    b = a.new_zeros(sum(sizes), len(a))
    column = 0
    for i, delta in blocks.items():
        rows, r = slice(sum(sizes[:i]), sum(sizes[: i + 1])), delta.b.size(1)
        b[rows, column : column + r] = delta.b
        column += r
        if norms is not None and delta.magnitude is not None:
            norms[rows] = delta.magnitude
    return Delta(a, b, next(iter(blocks.values())).scale, norms)


def to_modules(
    names: WeightMap, name: str, blocks: Mapping[int, Delta], sizes: Sequence[int], norms: Optional[torch.Tensor] = None
) -> dict[str, Delta]:
    """The updates of a layer's blocks, by the Hugging Face modules that hold them. Arguments as in `fused`."""
    stored = names.stored(name)
    if len(stored) > 1:
        return {stored[i].module: delta for i, delta in blocks.items()}
    return {stored[0].module: fused(blocks, sizes, norms).ordered(stored[0].rows)}


def adapted_modules(model: GPT) -> set[str]:
    """The Hugging Face modules that the LoRA layers of a model update."""
    names, found = weight_map(model.config), set()
    for name, layer in lora_layers(model).items():
        stored = names.stored(name)
        adapted = layer.adapted if len(stored) > 1 else (True,)
        found |= {form.module for form, on in zip(stored, adapted) if on}
    return found


@torch.no_grad()
def learned_deltas(model: GPT) -> dict[str, Delta]:
    """What the LoRA layers of a model learned, by Hugging Face module under the names of the family's table."""
    names = weight_map(model.config)
    deltas: dict[str, Delta] = {}
    for name, layer in lora_layers(model).items():
        blocks = {i: Delta(a, b, 1.0, magnitude) for i, a, b, magnitude in layer.learned()}
        in_one = layer.magnitude is not None and len(names.stored(name)) == 1
        norms = full_weight(layer.linear).float().norm(dim=1) if in_one else None
        deltas |= to_modules(names, name, blocks, layer.sizes, norms)
    return deltas


@torch.no_grad()
def fill(model: GPT, deltas: dict[str, Delta]) -> list[str]:
    """Move updates from `deltas` into the LoRA layers of a model. Returns the modules and shapes of those that do not
    fit."""
    names, wrong = weight_map(model.config), []
    for name, layer in lora_layers(model).items():
        modules = names.stored(name)
        sizes = layer.sizes if len(modules) > 1 else [sum(layer.sizes)]
        for stored, n_rows, end in zip(modules, sizes, itertools.accumulate(sizes)):
            delta = deltas.pop(stored.module, None)
            if delta is not None and delta.shape != (n_rows, layer.linear.in_features):
                wrong.append(f"{stored.module} {delta.shape}")
            elif delta is not None:
                delta = delta if stored.rows is None else delta.ordered(stored.rows.argsort())
                fill_rows(layer, end - n_rows, delta)
    return wrong


def fill_rows(layer: LoRALinear, first: int, delta: Delta) -> None:
    """Copy an update into those blocks of a layer that it has the rows of, from row `first` on."""
    r = len(delta.a)
    for at, (_, a, b), magnitude in zip(layer.rows, layer.blocks(), layer.magnitudes):
        if first <= at.start < first + len(delta.b):
            rows = slice(at.start - first, at.stop - first)
            a.zero_()[:r] = delta.a  # a lower rank is padded with zeros
            b.zero_()[:, :r] = delta.b[rows] * (delta.scale / layer.lora.scaling)
            if magnitude is not None and delta.magnitude is not None:
                magnitude.copy_(delta.magnitude[rows])
