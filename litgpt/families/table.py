"""Weight names: one table per family, written once and read in both directions.

Two views of a layer must not be mixed up. Its math blocks, `layer.parts`, are the rows that have a meaning of their own
(q, k and v; gate and up). Its storage is the Hugging Face modules that hold these rows: one per block in most families,
but a single one for all blocks in some, which may also order the rows differently. `WeightMap.stored` tells.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Optional, Union

import torch
from torch import nn


@dataclass(frozen=True)
class Stored:
    """A Hugging Face module and how it holds rows of ours."""

    module: str  # its name
    rows: Optional[torch.Tensor] = None  # for each of its rows, the index of our row; None if the order is the same
    transposed: bool = False  # whether its weight is (in_features, out_features)
    one_row: bool = False  # whether it has our vector as a matrix of one row
    scalar: bool = False  # whether it has the only number of our vector as a scalar

    def to_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor[0] if self.one_row else tensor[None] if self.scalar else tensor
        tensor = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        return tensor if self.rows is None else tensor[self.rows.argsort()]

    def from_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stored form of our rows of a weight or bias."""
        tensor = tensor if self.rows is None else tensor[self.rows.to(tensor.device)]
        tensor = tensor[None] if self.one_row else tensor[0] if self.scalar else tensor
        return tensor.T if self.transposed and tensor.dim() == 2 else tensor


HFModules = Union[str, Stored, Sequence[str]]
Rules = Mapping[str, HFModules]


class StoredTensor(NamedTuple):
    """A Hugging Face tensor that holds rows of a parameter of ours."""

    name: str
    form: Stored  # how it holds them
    rows: slice  # which rows of our parameter they are


class Parameter(NamedTuple):
    name: str  # our name of it, in which wrappers, which hold a layer as `linear`, do not show
    module: nn.Module  # the module that has it
    leaf: str  # its name there: weight, bias, or another one, that of a buffer for instance
    stored: tuple[Stored, ...]  # the Hugging Face modules that hold it

    @property
    def value(self) -> torch.Tensor:
        return getattr(self.module, self.leaf)

    @property
    def tensors(self) -> list[StoredTensor]:
        """The Hugging Face tensors that hold its rows, in the order of the rows."""
        n_rows = len(self.value)
        sizes = getattr(self.module, "parts", None) or (n_rows,)
        ends = [0, *itertools.accumulate(sizes)] if len(self.stored) > 1 else [0, n_rows]
        assert len(ends) == len(self.stored) + 1
        return [
            StoredTensor(f"{form.module}.{self.leaf}", form, slice(start, stop))
            for form, start, stop in zip(self.stored, ends, ends[1:])
        ]

    def shape(self, tensor: StoredTensor) -> tuple[int, ...]:
        """The shape of one of `tensors`."""
        ours = (tensor.rows.stop - tensor.rows.start, *self.value.shape[1:])
        ours = () if tensor.form.scalar else ours
        return ours[::-1] if tensor.form.transposed else (1, *ours) if tensor.form.one_row else ours


class WeightMap:
    """Which Hugging Face tensors hold which rows of a model.

    Args:
        rules: Maps each of our modules to its Hugging Face module, to a list with one module per block in the order of
            the blocks, or to a `Stored` that holds all rows in another form. Parameter names (weight, bias) carry over.
            A buffer, or a parameter of another name, has a rule of its own, from one full name to the other, with the
            same last part.
        unused: Matches tensors that a checkpoint may have and that are not read.
        kept: Matches tensors that are not read, but copied unchanged when a model is written from the checkpoint.
        tied: Whether the head is the embedding.
    """

    def __init__(
        self, rules: Rules, unused: str = r"rotary_emb\.inv_freq$", kept: str = r"(?!)", tied: bool = False
    ) -> None:
        self.rules: dict[str, tuple[Stored, ...]] = {}
        for ours, hf in rules.items():
            several = [hf] if isinstance(hf, (str, Stored)) else hf
            self.rules[ours] = tuple(m if isinstance(m, Stored) else Stored(m) for m in several)
        self.inverse = {form.module: (ours, i) for ours, forms in self.rules.items() for i, form in enumerate(forms)}
        self.unused, self.kept = re.compile(unused), re.compile(kept)
        self.embedding = f"{self.rules['transformer.wte'][0].module}.weight"
        self.head = f"{self.rules['lm_head'][0].module}.weight"
        self.tied_head = self.head if tied else ""  # which is not stored then

    def stored(self, ours: str) -> tuple[Stored, ...]:
        """The Hugging Face modules that hold our module, in the order of its rows; empty if there are none. Several
        hold one block each; a single one holds all."""
        return self.rules.get(without_wrappers(ours), ())

    def holders(self, ours: str, parts: Sequence[int]) -> tuple[str, ...]:
        """For each block of our module, the name of the Hugging Face module that holds it."""
        names = tuple(form.module for form in self.stored(ours))
        return names * len(parts) if len(names) == 1 else names

    def find(self, hf: str) -> tuple[str, int]:
        """Our module that a Hugging Face module holds, and its index in `stored`; ("", 0) if it is unknown."""
        return self.inverse.get(hf, ("", 0))

    def find_parameter(self, hf: str) -> str:
        """Our name of the parameter that a Hugging Face tensor holds rows of; empty if it is unknown."""
        if hf in self.inverse:  # a full name
            return self.inverse[hf][0]
        module, _, leaf = hf.rpartition(".")
        ours, _ = self.find(module)
        return ours and f"{ours}.{leaf}"

    def parameters(self, model: nn.Module) -> dict[str, Parameter]:
        """The pretrained parameters of a model by our names, without those that a method added, and the buffers that
        files hold. No method trains the latter, and they keep their dtype."""
        found = {}
        for path, module in model.named_modules():
            stored = self.stored(path)
            for leaf in ("weight", "bias"):
                if stored and module._parameters.get(leaf) is not None:
                    name = f"{without_wrappers(path)}.{leaf}"
                    found[name] = Parameter(name, module, leaf, stored)
            for leaf in (*module._parameters, *module._buffers):
                if stored := self.stored(name := f"{path}.{leaf}"):
                    forms = tuple(replace(form, module=form.module.rpartition(".")[0]) for form in stored)
                    found[name] = Parameter(name, module, leaf, forms)
        return found


def without_wrappers(path: str) -> str:
    return re.sub(r"(\.linear)+$", "", path)


def in_layers(
    layers: Iterable[int], rules: Rules, hf_layer: str = "model.layers.{}.", our_layer: str = "transformer.h.{}."
) -> dict[str, HFModules]:
    """The rules of some layers from those of one: each name gets the prefix of its side. `{}` is the layer's index."""

    def prefixed(hf: HFModules, prefix: str) -> HFModules:
        if isinstance(hf, Stored):
            return replace(hf, module=prefix + hf.module)
        return prefix + hf if isinstance(hf, str) else [prefix + part for part in hf]

    return {our_layer.format(i) + ours: prefixed(hf, hf_layer.format(i)) for i in layers for ours, hf in rules.items()}


def rows_by_group(n_head: int, n_query_groups: int, head_size: int) -> torch.Tensor:
    """The row order of a fused qkv that holds, for each key-value head, its query heads, its key and its value."""
    n, g = n_head * head_size, n_query_groups * head_size
    q, k, v = torch.arange(n + 2 * g, device="cpu").split([n, g, g])
    return torch.cat([t.view(n_query_groups, -1) for t in (q, k, v)], dim=1).flatten()


@dataclass(frozen=True)
class Aliases:
    """Other names and forms of a family's weights: in files, and in memory in transformers 5. `stacks` maps the end of
    a tensor's name to the ends that its parts have in the table. The tensor stacks the experts; in each expert the
    parts follow one another along the rows. `{}` is the expert's index. With `in_files` files are written with the
    names in memory, and with stacks, which then have one part each; their biases have names that end with `_bias`."""

    renames: Sequence[tuple[str, str]] = ()  # patterns and replacements, from other names to the table's
    stacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    memory: Sequence[tuple[str, str]] = ()  # from the table's names to those in memory, which adapters use
    in_peft: bool = True  # whether `peft` takes the names of experts' modules for the stacks
    in_files: bool = False

    def rename(self, name: str) -> str:
        return substituted(self.renames, name)

    def in_memory(self, name: str) -> str:
        return substituted(self.memory, name)

    def expand(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], Optional[tuple]]]:
        """The tensors of the table that a stored tensor holds: name, shape, and index in the stored tensor."""
        name = self.rename(name)
        for end, parts in self.stacks.items():
            end, leaf, dims = (f"{end}_bias", ".bias", 2) if name.endswith("_bias") else (end, ".weight", 3)
            if name.endswith(end) and len(shape) == dims and shape[1] % len(parts) == 0:
                stem, rows = name.removesuffix(end), shape[1] // len(parts)
                return [
                    (
                        stem + part.removesuffix(".weight").format(expert) + leaf,
                        (rows, *shape[2:]),
                        (expert, slice(i * rows, (i + 1) * rows)),
                    )
                    for expert in range(shape[0])
                    for i, part in enumerate(parts)
                ]
        return [(name, shape, None)]

    def stacked(self, name: str) -> tuple[str, Optional[int]]:
        """The tensor to write that holds one of the table, and the index in it; None if it is that tensor."""
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)", name) if self.in_files else None
        if found is None:
            return self.in_memory(name) if self.in_files else name, None
        return f"{found[1]}.{found[3]}" + "_bias" * (found[4] == "bias"), int(found[2])


def substituted(rules: Sequence[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
