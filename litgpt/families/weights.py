"""The weights of a folder by their Hugging Face names, whatever form its files have."""

import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.families.table import WeightMap
from litgpt.model.config import Config
from litgpt.model.gpt import GPT

KINDS = ("model.safetensors", "pytorch_model.bin")  # of weights; the first that is there is read
READ = 2**28  # bytes after which a file is opened again, so that its pages do not stay in memory
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = tuple(DTYPES)  # the names in safetensors; integers and 8 bits need scales, not a cast


def check_count(config: Config, n_tensors: int) -> None:
    """Raise `UserError` if a model needs more tensors than there are, because building it could take all memory."""
    experts = sum(config.n_expert for layer in range(config.n_layer) if config.mlp_class(layer) == "LLaMAMoE")
    if config.n_layer + experts > n_tensors:
        raise UserError(
            f"config.json describes {config.n_layer} layers{f' and {experts} experts' * bool(experts)}, but there are "
            f"only {n_tensors} tensors."
        )


class Outline(NamedTuple):
    """A weight to write: its Hugging Face name, the name of its type in safetensors, and its shape."""

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
    """The weights of a folder by the names of the family's table, whatever names and forms its files have."""

    folder: Path
    config: Config
    fields: dict[str, Any]  # of `config.json`
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors names them: F32, BF16, ...
    files: dict[str, Path]

    @abstractmethod
    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield weights with their names."""

    @abstractmethod
    def shards(self) -> list[Path]:
        """The files that hold weights."""

    def tensor(self, name: str) -> torch.Tensor:
        """One weight. To read many, use `tensors`, which opens each file once."""
        ((_, tensor),) = self.tensors([name])
        return tensor

    def part(self, name: str, dim: int, ranges: Sequence[range]) -> torch.Tensor:
        """Some ranges of one dimension of a weight."""
        tensor = self.tensor(name)
        return torch.cat([tensor.narrow(dim, part.start, len(part)) for part in ranges], dim)

    def outline(self, name: str) -> Outline:
        return Outline(name, self.dtypes[name], self.shapes[name])


class EmptyWeights(Weights):
    """The weights that a model needs, without their contents: names, shapes and dtypes alone. `dtypes` has those that
    are known; the others are bfloat16."""

    def __init__(self, model: GPT, fields: dict[str, Any], folder: Path, dtypes: Mapping[str, str]) -> None:
        names = weight_map(model.config)
        self.folder, self.config, self.fields = folder, model.config, fields
        self.shapes = {
            tensor.name: parameter.shape(tensor)
            for parameter in names.parameters(model).values()
            for tensor in parameter.tensors
            if tensor.name != names.tied_head
        }
        self.dtypes = {name: dtypes.get(name, "BF16") for name in self.shapes}
        self.files = dict.fromkeys(self.shapes, folder)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, torch.empty(self.shapes[name], dtype=DTYPES[self.dtypes[name]])

    def shards(self) -> list[Path]:
        return []


def check_weights(model: GPT, checkpoint: Weights) -> None:
    """Raise `UserError` unless the checkpoint has the names and shapes of the model's weights."""
    names = weight_map(model.config)
    expected = {
        tensor.name: parameter.shape(tensor)
        for parameter in names.parameters(model).values()
        for tensor in parameter.tensors
        if tensor.name != names.tied_head
    }
    problems = defaultdict(list)
    for name, shape in expected.items():
        if name not in checkpoint.shapes:
            problems["missing"].append(name)
        elif checkpoint.shapes[name] != shape:
            problems["of another shape"].append(f"{name} {checkpoint.shapes[name]} instead of {shape}")
        elif checkpoint.dtypes[name] not in FLOATS:
            problems["of an unsupported type"].append(f"{name} {checkpoint.dtypes[name]}")
    for name in checkpoint.shapes:
        if not (name in expected or name == names.tied_head or names.unused.search(name) or names.kept.search(name)):
            problems["unknown"].append(name)
    if problems:
        listed = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in problems.items())
        raise UserError(f"The weights in {checkpoint.folder} do not match its config.json. {listed}.")


def is_tied(checkpoint: Weights, names: WeightMap) -> bool:
    """Whether a tied head is not stored, or is the embedding."""
    if names.tied_head not in checkpoint.files or names.embedding not in checkpoint.files:
        return True
    return torch.equal(checkpoint.tensor(names.head), checkpoint.tensor(names.embedding))


def check_tied(checkpoint: Weights, names: WeightMap) -> None:
    """Raise `UserError` if a tied head is stored and differs from the embedding."""
    if not is_tied(checkpoint, names):
        raise UserError(
            f"{checkpoint.folder} has a {names.head} that differs from {names.embedding}, but its config.json ties "
            "them. Set tie_word_embeddings to false there, or remove the weight."
        )
