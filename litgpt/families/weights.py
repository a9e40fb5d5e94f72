"""The weights of a model by their Hugging Face names, whatever the files are: which ones a model has, and which of our
parameters they hold."""

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.families import name_table
from litgpt.families.table import NameTable, Stored
from litgpt.model import GPT
from litgpt.model.config import Config

KINDS = ("model.safetensors", "pytorch_model.bin")  # of weights; the first that is there is read


READ = 2**30  # bytes after which a file is opened anew, so that its pages are not kept


NUMBERS = ("F64", "F32", "F16", "BF16")  # in safetensors' words; whole numbers and 8 bits want scales, not a cast


def check_count(config: Config, n_tensors: int) -> None:
    """Raise `UserError` for a model that needs more tensors than there are; making it could take all memory."""
    experts = sum(config.n_expert for layer in range(config.n_layer) if config.mlp_class(layer) == "LLaMAMoE")
    if config.n_layer + experts > n_tensors:
        raise UserError(
            f"config.json describes {config.n_layer} layers{f' and {experts} experts' * bool(experts)}, but there are "
            f"only {n_tensors} tensors."
        )


class Outline(NamedTuple):
    """A weight that is to be written: its Hugging Face name, its type in safetensors' words, and its shape."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def item_size(self) -> int:
        bits = re.search(r"\d+", self.kind)
        return int(bits[0]) // 8 if bits else 1

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.item_size


class Weights(ABC):
    """The weights of a folder by the names of the family's table, whatever names and forms its files have.

    Attributes:
        folder: Where the files are.
        config: The model.
        fields: Its `config.json`.
        shapes: Of all weights.
        dtypes: In safetensors' words: F32, BF16, ...
        files: The file that holds each weight.
    """

    folder: Path
    config: Config
    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    files: dict[str, Path]

    @abstractmethod
    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights with their names, one after the other."""

    @abstractmethod
    def shards(self) -> list[Path]:
        """The files of weights."""

    def tensor(self, name: str) -> torch.Tensor:
        """One weight. To read many, use `tensors`, which opens each file once."""
        ((_, tensor),) = self.tensors([name])
        return tensor

    def outline(self, name: str) -> Outline:
        return Outline(name, self.dtypes[name], self.shapes[name])


def base_parameters(model: GPT) -> dict[str, tuple[nn.Module, str]]:
    """The pretrained weights of a model: our name to its module and attribute.

    What a method added is left out, and a method's wrapper, which holds the layer as `linear`, does not show.
    """
    table = name_table(model.config)
    found = {}
    for path, module in model.named_modules():
        name = re.sub(r"(\.linear)+$", "", path)
        for leaf in module._parameters:
            if leaf in ("weight", "bias") and module._parameters[leaf] is not None and table.stored(name):
                found[f"{name}.{leaf}"] = (module, leaf)
    return found


def stored_pieces(
    table: NameTable, name: str, module: nn.Module, leaf: str, weight: Optional[torch.Tensor] = None
) -> list[tuple[str, Stored, torch.Tensor]]:
    """How a parameter of ours is stored: each Hugging Face tensor's name, its form, and our rows that it holds.

    Args:
        name: Our name of the parameter, as in `base_parameters`.
        weight: The whole parameter; by default as it is in the module.
    """
    weight = getattr(module, leaf).detach() if weight is None else weight
    pieces = table.pieces(name.rpartition(".")[0], getattr(module, "parts", None) or (len(weight),))
    rows = weight.split([n for _, n in pieces])
    return [(f"{stored.module}.{leaf}", stored, part) for (stored, _), part in zip(pieces, rows)]


def places(table: NameTable, name: str, module: nn.Module, leaf: str) -> list[tuple[Stored, int]]:
    """The same for one that may be sharded: the form of each tensor, and the first of our rows that it holds."""
    n_rows = len(getattr(module, leaf))
    pieces = table.pieces(name.rpartition(".")[0], getattr(module, "parts", None) or (n_rows,))
    firsts = itertools.accumulate((n for _, n in pieces), initial=0)
    return [(stored, first) for (stored, _), first in zip(pieces, firsts)]


def check_weights(model: GPT, checkpoint: Weights) -> None:
    """Raise `UserError` unless names and shapes in the checkpoint are those of the model."""
    table, tied = name_table(model.config), tied_head(model.config)
    wanted = {
        hf: tuple(stored.shape(rows.shape))
        for name, (module, leaf) in base_parameters(model).items()
        for hf, stored, rows in stored_pieces(table, name, module, leaf)
        if hf != tied
    }
    problems = defaultdict(list)
    for name, shape in wanted.items():
        if name not in checkpoint.shapes:
            problems["missing"].append(name)
        elif checkpoint.shapes[name] != shape:
            problems["of another shape"].append(f"{name} {checkpoint.shapes[name]} instead of {shape}")
        elif checkpoint.dtypes[name] not in NUMBERS:
            problems["of a type that is not supported"].append(f"{name} {checkpoint.dtypes[name]}")
    for name in checkpoint.shapes:
        if not (name in wanted or name == tied or table.unused.search(name) or table.kept.search(name)):
            problems["unknown"].append(name)
    if problems:
        raise UserError(
            f"The weights in {checkpoint.folder} do not fit its config.json: "
            + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items())
            + "."
        )


def check_tied(checkpoint: Weights, head: str, embedding: str) -> None:
    """Raise `UserError` where a head that is said to be the embedding is stored and is something else."""
    if not torch.equal(checkpoint.tensor(head), checkpoint.tensor(embedding)):
        raise UserError(
            f"{checkpoint.folder} has a {head} that is not {embedding}, but its config.json says that they are tied: "
            "set tie_word_embeddings to false there, or remove the weight."
        )


def tied_head(config: Config) -> str:
    """The Hugging Face name of the head's weight where it is the embedding; else nothing."""
    return f"{name_table(config).to_hf('lm_head')[0]}.weight" if config.tie_embeddings else ""
