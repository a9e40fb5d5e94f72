"""Weight names: one table per family, written once and read in both directions."""

import re
from collections.abc import Mapping, Sequence
from typing import Union

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
HFModules = Union[str, Sequence[str]]
Rules = Mapping[str, HFModules]


class NameTable:
    """Pairs our modules with the Hugging Face modules whose rows they hold.

    Args:
        rules: Our module to its Hugging Face module, or to the several whose rows it holds, one block below the other
            (q, k and v; gate and up). `{}` stands for a number. Names of parameters (weight, bias) carry over.
        unused: What matches may stand in a checkpoint and is not read.
    """

    def __init__(self, rules: Rules, unused: str = r"rotary_emb\.inv_freq$") -> None:
        self.rules = {ours: (hf,) if isinstance(hf, str) else tuple(hf) for ours, hf in rules.items()}
        self.inverse = {hf: (ours, part) for ours, parts in self.rules.items() for part, hf in enumerate(parts)}
        self.unused = re.compile(unused)

    def to_hf(self, ours: str) -> tuple[str, ...]:
        """The Hugging Face modules that make our module, in the order of their rows; none if it has none."""
        numbers = NUMBER.findall(ours)
        return tuple(hf.format(*numbers) for hf in self.rules.get(NUMBER.sub("{}", ours), ()))

    def from_hf(self, hf: str) -> tuple[str, int] | None:
        """Our module that holds a Hugging Face module, and which of its blocks of rows that is; None if unknown."""
        found = self.inverse.get(NUMBER.sub("{}", hf))
        return (found[0].format(*NUMBER.findall(hf)), found[1]) if found else None


def in_layers(rules: Rules, hf_layer: str, our_layer: str = "transformer.h.{}.") -> dict[str, HFModules]:
    """Rules for one layer, each name put behind the prefix of its side."""
    return {
        our_layer + ours: hf_layer + hf if isinstance(hf, str) else [hf_layer + part for part in hf]
        for ours, hf in rules.items()
    }
