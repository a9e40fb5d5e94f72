"""Weight names: one table per family, written once and read in both directions.

Two views of a layer must not be mixed up. Its math blocks, `layer.parts`, are the rows that mean something of their own
(q, k and v; gate and up). Its storage is the Hugging Face modules that hold these rows: one for each block in most
families, but a single one for all blocks in some, and there the rows may have another order. `NameTable.stored` tells.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional, Union

import torch


@dataclass(frozen=True)
class Stored:
    """A Hugging Face module and how it holds rows of ours.

    Args:
        module: Its name.
        rows: For each of its rows, which of ours it is; the same order by default.
        transposed: Whether its weight is (in_features, out_features).
    """

    module: str
    rows: Optional[torch.Tensor] = None
    transposed: bool = False

    def to_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """Our rows from what is stored: a weight or a bias."""
        tensor = tensor.T if self.transposed and tensor.dim() == 2 else tensor
        return tensor if self.rows is None else tensor[self.rows.argsort()]

    def from_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is stored from our rows: a weight or a bias."""
        tensor = tensor if self.rows is None else tensor[self.rows.to(tensor.device)]
        return tensor.T if self.transposed and tensor.dim() == 2 else tensor

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is stored, from that of our rows."""
        return tuple(reversed(ours)) if self.transposed else tuple(ours)


HFModules = Union[str, Stored, Sequence[str]]
Rules = Mapping[str, HFModules]


class NameTable:
    """Pairs our modules with the Hugging Face modules that hold their rows.

    Args:
        rules: Our module to its Hugging Face module; to the several that hold its blocks, in their order; or to a
            `Stored`, where one holds all its rows in another way. Names of parameters (weight, bias) carry over.
        unused: What matches may stand in a checkpoint and is not read.
        kept: What matches is not read, and is carried over as it is into what is written from the checkpoint.
    """

    def __init__(self, rules: Rules, unused: str = r"rotary_emb\.inv_freq$", kept: str = r"(?!)") -> None:
        self.rules: dict[str, tuple[Stored, ...]] = {}
        for ours, hf in rules.items():
            several = [hf] if isinstance(hf, (str, Stored)) else hf
            self.rules[ours] = tuple(m if isinstance(m, Stored) else Stored(m) for m in several)
        self.inverse = {
            stored.module: (ours, i) for ours, several in self.rules.items() for i, stored in enumerate(several)
        }
        self.unused, self.kept = re.compile(unused), re.compile(kept)

    def stored(self, ours: str) -> tuple[Stored, ...]:
        """The Hugging Face modules that hold our module, in the order of its rows; none if it has none.

        Several hold one block each; a single one holds all. A wrapper holds its layer as `linear` and does not show.
        """
        return self.rules.get(re.sub(r"(\.linear)+$", "", ours), ())

    def to_hf(self, ours: str) -> tuple[str, ...]:
        """The names of `stored`."""
        return tuple(stored.module for stored in self.stored(ours))

    def holders(self, ours: str, parts: Sequence[int]) -> tuple[str, ...]:
        """For each block of our module the Hugging Face module that holds it: the same for all where one holds all."""
        several = self.to_hf(ours)
        return several * len(parts) if len(several) == 1 else several

    def from_hf(self, hf: str) -> tuple[str, int] | None:
        """Our module that a Hugging Face module holds, and which of `stored` that is; None if unknown."""
        return self.inverse.get(hf)

    def pieces(self, ours: str, parts: Sequence[int]) -> list[tuple[Stored, int]]:
        """`stored` with the number of our rows that each holds.

        Args:
            parts: The rows of each block of our module.
        """
        several = self.stored(ours)
        assert len(several) in (1, len(parts))
        return list(zip(several, parts if len(several) > 1 else (sum(parts),)))


def in_layers(
    n_layer: int, rules: Rules, hf_layer: str = "model.layers.{}.", our_layer: str = "transformer.h.{}."
) -> dict[str, HFModules]:
    """Rules for every layer from those of one, each name put behind the prefix of its side. `{}` is the number."""

    def prefixed(hf: HFModules, prefix: str) -> HFModules:
        if isinstance(hf, Stored):
            return Stored(prefix + hf.module, hf.rows, hf.transposed)
        return prefix + hf if isinstance(hf, str) else [prefix + part for part in hf]

    return {
        our_layer.format(i) + ours: prefixed(hf, hf_layer.format(i))
        for i in range(n_layer)
        for ours, hf in rules.items()
    }


def rows_by_group(n_head: int, n_query_groups: int, head_size: int) -> torch.Tensor:
    """The order of a fused qkv that holds, for each key-value head, its query heads, its key and its value."""
    n, g = n_head * head_size, n_query_groups * head_size
    q, k, v = torch.arange(n + 2 * g, device="cpu").split([n, g, g])
    return torch.cat([t.view(n_query_groups, -1) for t in (q, k, v)], dim=1).flatten()


@dataclass(frozen=True)
class Aliases:
    """Other names and other forms of the weights of a family: in files, and in the memory of transformers 5.

    Args:
        renames: Pattern and replacement for each, in the manner of `re.sub`.
        stacks: The end of a tensor's name to the ends that its parts have in the table: the tensor stacks the experts,
            and in each the parts lie one below the other. `{}` stands for the expert's number.
        memory: Like `renames`, but from the table's names to those in memory. Adapters go by the latter.
    """

    renames: Sequence[tuple[str, str]] = ()
    stacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    memory: Sequence[tuple[str, str]] = ()

    def rename(self, name: str) -> str:
        """A tensor's name in the words of the table."""
        return substituted(self.renames, name)

    def in_memory(self, name: str) -> str:
        """The name in memory of a module, or a tensor, of the table."""
        return substituted(self.memory, name)

    def expand(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...], Optional[tuple]]]:
        """What a stored tensor is in the words of the table: the name and shape of each part, and its index in it."""
        name = self.rename(name)
        for end, parts in self.stacks.items():
            if name.endswith(end) and len(shape) == 3 and shape[1] % len(parts) == 0:
                rows = shape[1] // len(parts)
                return [
                    (
                        name.removesuffix(end) + part.format(expert),
                        (rows, shape[2]),
                        (expert, slice(i * rows, (i + 1) * rows)),
                    )
                    for expert in range(shape[0])
                    for i, part in enumerate(parts)
                ]
        return [(name, shape, None)]


def substituted(rules: Sequence[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
