"""A Hugging Face model folder: opened lazily, read into a model one tensor at a time, and checked before."""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from litgpt.errors import UserError
from litgpt.families import aliases, name_table, read_config
from litgpt.families.weights import (
    KINDS,
    READ,
    Weights,
    base_parameters,
    check_count,
    check_tied,
    check_weights,
    places,
    tied_head,
)
from litgpt.litgpt_format.folder import MODEL, LitCheckpoint, has_hf_weights, say
from litgpt.model import GPT
from litgpt.model.config import Config
from litgpt.model.linear import PartwiseLinear
from litgpt.model.sharded import is_sharded, put, unsharded
from litgpt.storage.files import is_there, read_json
from litgpt.storage.torch_file import TorchFile


class Checkpoint(Weights):
    """The weights and the configuration in a folder; opening it reads no weight.

    Weights go by the names of the family's table, also where the files have other names or stacks of experts.

    Args:
        folder: Has `config.json` and either `model.safetensors` or an index with its shards; or, in their place,
            `pytorch_model.bin` or its index.

    Raises:
        UserError: something is missing, cut short, or of a kind that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not is_there(folder / "config.json"):
            hint = (
                f" Did you mean '{folder / 'final'}'?" if (folder / "final").is_dir() else ""
            )  # as training leaves it
            raise UserError(f"{folder} has no config.json: it is no Hugging Face model folder.{hint}")
        self.fields: dict[str, Any] = read_json(folder / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors names them: F32, BF16, ...
        self.files: dict[str, Path] = {}
        self.places: dict[str, tuple[str, Optional[tuple]]] = {}  # the name in the file, and the index in that tensor
        self.aliases = aliases(self.fields.get("model_type"))
        for file in self.shards():
            self.read_header(file)

    @cached_property
    def config(self) -> Config:  # type: ignore[override]
        """Raises `UserError` when the family is unknown or asks for math that is not implemented."""
        try:
            config = read_config(self.fields, name=self.folder.name)
            check_count(config, len(self.shapes))
        except UserError as e:
            raise UserError(f"{self.folder}: {e}") from e
        return config

    def shards(self) -> list[Path]:
        there = [kind for kind in KINDS if any(is_there(self.folder / f"{kind}{end}") for end in (".index.json", ""))]
        kind = (there or KINDS)[0]
        index_file = self.folder / f"{kind}.index.json"
        if index_file.is_file() and not (self.folder / kind).is_file():
            names = sorted(set(read_json(index_file)["weight_map"].values()))
            if not names or any(Path(n).name != n for n in names):
                raise UserError(f"{index_file} does not list files of its own folder.")
        else:
            names = [kind]
        missing = [n for n in names if not os.path.isfile(self.folder / n)]  # Path's own raises for a name too long
        if missing:
            raise UserError(f"{self.folder} has no {', '.join(missing)}: the download is not complete.")
        return [self.folder / n for n in names]

    def read_header(self, file: Path) -> None:
        with opened(file) as f:
            for stored in sorted(f.keys()):
                view = f.get_slice(stored)
                for name, shape, index in self.aliases.expand(stored, tuple(view.get_shape())):
                    self.shapes[name], self.dtypes[name] = shape, view.get_dtype()
                    self.files[name], self.places[name] = file, (stored, index)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights with their names, one after the other. A file stays open while the next weight is in it, too. After
        a gigabyte it is opened anew, because its pages stay in memory until it is closed."""
        waiting = deque(names)
        while waiting:
            file, n_bytes = self.files[waiting[0]], 0
            with opened(file) as f:
                while waiting and self.files[waiting[0]] == file and n_bytes < READ:
                    name = waiting.popleft()
                    stored, index = self.places[name]
                    tensor = f.get_tensor(stored) if index is None else f.get_slice(stored)[index]
                    n_bytes += tensor.nbytes
                    yield name, tensor


class Overlaid(Weights):
    """A checkpoint with other tensors in place of some of its own, or beside them.

    Args:
        replaced: The other tensors, by their names in the family's table. Where the model is written, they have the
            types of the base.
        config: What the model is with them. The number of embeddings may be another, and a tied head one of its own.
    """

    def __init__(self, base: Weights, replaced: dict[str, torch.Tensor], config: Config) -> None:
        self.base, self.replaced = base, replaced
        self.folder, self.config = base.folder, config
        self.shapes = base.shapes | {name: tuple(tensor.shape) for name, tensor in replaced.items()}
        embedding = f"{name_table(config).to_hf('transformer.wte')[0]}.weight"  # a head of its own gets its type
        self.dtypes = dict.fromkeys(replaced, base.dtypes.get(embedding, "F32")) | base.dtypes
        self.files = dict.fromkeys(replaced, base.folder) | base.files
        for known in (self.shapes, self.dtypes, self.files):  # the base may store a tied head, too
            known.pop(tied_head(config), None)

    @cached_property
    def fields(self) -> dict[str, Any]:  # type: ignore[override]
        return with_changes(self.base.fields, self.base.config, self.config)

    def shards(self) -> list[Path]:
        return self.base.shards()

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for is_replaced, group in itertools.groupby(names, self.replaced.__contains__):
            if is_replaced:
                yield from ((name, self.replaced[name]) for name in group)
            else:
                yield from self.base.tensors(group)


def with_changes(fields: dict[str, Any], before: Config, after: Config) -> dict[str, Any]:
    """A `config.json` with another number of embeddings and with a head of its own, where these have changed."""
    changes: dict[str, Any] = {}
    if after.padded_vocab_size != before.padded_vocab_size:
        changes["vocab_size"] = after.padded_vocab_size
    if after.tie_embeddings != before.tie_embeddings:
        changes["tie_word_embeddings"] = after.tie_embeddings
    if isinstance(fields.get("text_config"), dict):
        fields = fields | {"text_config": fields["text_config"] | changes}
        if "vocab_size" not in fields:
            changes.pop("vocab_size", None)
    return fields | changes


def opened(file: Path) -> Any:
    if file.suffix == ".bin":
        return TorchFile(file)
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is damaged or cut short ({str(e).splitlines()[0]}). Download it again.") from e


def load_weights(
    model: GPT, checkpoint: Weights, dtype: torch.dtype, device: torch.device, shards: Optional[torch.device] = None
) -> None:
    """Fill a model that was built on the meta device.

    Pretrained weights come from the checkpoint, one by one, as `dtype` or quantized from it; parameters that a method
    added are made as they are declared and drawn by their module's `reset_parameters`.

    Args:
        shards: Where sharded weights lie; by default on `device`, like the others.

    Raises:
        UserError: the checkpoint lacks a weight, has one that the model does not know, or one of another shape; all
            of them at once. Or it has a tied head that differs from the embedding.
    """
    check_weights(model, checkpoint)
    table, slots, tied = name_table(model.config), base_parameters(model), tied_head(model.config)
    for name, (module, leaf) in slots.items():
        old = module._parameters[leaf]
        assert old is not None
        if isinstance(module, PartwiseLinear) and leaf == "weight":
            module.begin(len(table.stored(name.rpartition(".")[0])))  # one part per Hugging Face tensor
            continue
        empty = empty_like(old, dtype, shards if shards and is_sharded(old) else device)
        setattr(module, leaf, nn.Parameter(empty, requires_grad=old.requires_grad))
    if tied in checkpoint.files:
        check_tied(checkpoint, tied, f"{table.to_hf('transformer.wte')[0]}.weight")
    fill_weights(model, checkpoint, slots)
    model.tie_weights()
    for module in model.modules():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.is_meta}
        for leaf, p in own.items():
            setattr(module, leaf, nn.Parameter(empty_like(p, p.dtype, device), requires_grad=p.requires_grad))
        if own:
            with unsharded(module):
                module.reset_parameters()  # type: ignore[operator]


def empty_like(p: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor like one on the meta device. torch's function of this name imports a part of its compiler for it, which
    takes a third of a second; sharded ones need it."""
    if is_sharded(p):
        return torch.empty_like(p, dtype=dtype, device=device)
    return torch.empty(p.shape, dtype=dtype, device=device)


def fill_weights(model: GPT, checkpoint: Weights, slots: dict[str, tuple[nn.Module, str]]) -> None:
    """Read pretrained weights from the checkpoint into their places.

    Args:
        slots: Those that are wanted, as `base_parameters` has them.
    """
    table, tied = name_table(model.config), tied_head(model.config)
    targets: dict[str, tuple[str, int]] = {}  # our parameter, and which of the tensors that store it
    for name in checkpoint.files:
        module_name, _, leaf = name.rpartition(".")
        ours, part = table.from_hf(module_name) or ("", 0)
        if name != tied and f"{ours}.{leaf}" in slots:
            targets[name] = f"{ours}.{leaf}", part
    for name, tensor in checkpoint.tensors(targets):
        ours, part = targets[name]
        module, leaf = slots[ours]
        stored, first = places(table, ours, module, leaf)[part]
        tensor = stored.to_ours(tensor)
        if isinstance(module, PartwiseLinear) and leaf == "weight":
            module.store(part, tensor.to(model.device, model.dtype))
        else:
            put(getattr(module, leaf).detach(), first, tensor)


def open_checkpoint(folder: Path) -> Weights:
    """The model in a folder: in Hugging Face's form, or, where it has only that, in LitGPT's.

    Raises:
        UserError: it is neither, or damaged.
    """
    if not (folder / MODEL).is_file():
        return Checkpoint(folder)
    if not has_hf_weights(folder):
        return LitCheckpoint(folder)
    say(f"{folder} has a model in Hugging Face's form and one in LitGPT's: {MODEL} is not read.")
    return Checkpoint(folder)
