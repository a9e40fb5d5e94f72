"""A Hugging Face model folder: opened lazily, read into a model one tensor at a time, and checked before."""

import itertools
import json
import math
import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from litgpt.checkpoint.torch_file import NAMES, TorchFile
from litgpt.errors import UserError
from litgpt.families import aliases, name_table, read_config
from litgpt.families.table import NameTable, Stored
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model import GPT
from litgpt.model.config import Config
from litgpt.model.sharded import full, is_sharded, put, whole
from litgpt.storage.files import is_there, read_json

INDEX = "model.safetensors.index.json"
KINDS = ("model.safetensors", "pytorch_model.bin")  # of weights; the first that is there is read
READ = 2**30  # bytes after which a file is opened anew, so that its pages are not kept
NUMBERS = ("F64", "F32", "F16", "BF16")  # in safetensors' words; whole numbers and 8 bits want scales, not a cast


class Checkpoint:
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
    def config(self) -> Config:
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

    def outline(self, name: str) -> "Outline":
        return Outline(name, self.dtypes[name], self.shapes[name])

    def tensor(self, name: str) -> torch.Tensor:
        """One weight by its Hugging Face name. To read many, use `tensors`, which opens each file once."""
        ((_, tensor),) = self.tensors([name])
        return tensor

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


class Overlaid(Checkpoint):
    """A checkpoint with other tensors in place of some of its own, or beside them.

    Args:
        replaced: The other tensors, by their names in the family's table. Where the model is written, they have the
            types of the base.
        config: What the model is with them. The number of embeddings may be another, and a tied head one of its own.
    """

    def __init__(self, base: Checkpoint, replaced: dict[str, torch.Tensor], config: Config) -> None:
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


def check_count(config: Config, n_tensors: int) -> None:
    """Raise `UserError` for a model that needs more tensors than there are; making it could take all memory."""
    experts = sum(config.n_expert for layer in range(config.n_layer) if config.mlp_class(layer) == "LLaMAMoE")
    if config.n_layer + experts > n_tensors:
        raise UserError(
            f"config.json describes {config.n_layer} layers{f' and {experts} experts' * bool(experts)}, but there are "
            f"only {n_tensors} tensors."
        )


def opened(file: Path) -> Any:
    if file.suffix == ".bin":
        return TorchFile(file)
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is damaged or cut short ({str(e).splitlines()[0]}). Download it again.") from e


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


def load_weights(
    model: GPT, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, shards: Optional[torch.device] = None
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
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.stored = [None] * len(table.stored(name.rpartition(".")[0]))  # one state per Hugging Face tensor
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
            with whole(module):
                module.reset_parameters()  # type: ignore[operator]


def empty_like(p: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor like one on the meta device. torch's function of this name imports a part of its compiler for it, which
    takes a third of a second; sharded ones need it."""
    if is_sharded(p):
        return torch.empty_like(p, dtype=dtype, device=device)
    return torch.empty(p.shape, dtype=dtype, device=device)


def fill_weights(model: GPT, checkpoint: Checkpoint, slots: dict[str, tuple[nn.Module, str]]) -> None:
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
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.store(part, tensor.to(model.device, model.dtype))
        else:
            put(getattr(module, leaf).detach(), first, tensor)


def check_weights(model: GPT, checkpoint: Checkpoint) -> None:
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


def check_tied(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    """Raise `UserError` where a head that is said to be the embedding is stored and is something else."""
    if not torch.equal(checkpoint.tensor(head), checkpoint.tensor(embedding)):
        raise UserError(
            f"{checkpoint.folder} has a {head} that is not {embedding}, but its config.json says that they are tied: "
            "set tie_word_embeddings to false there, or remove the weight."
        )


def tied_head(config: Config) -> str:
    """The Hugging Face name of the head's weight where it is the embedding; else nothing."""
    return f"{name_table(config).to_hf('lm_head')[0]}.weight" if config.tie_embeddings else ""


SHARD = 5 * 10**9  # bytes that a file of weights holds at most


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


def write_model(model: GPT, fields: dict[str, Any], folder: Path, base: Optional[Checkpoint] = None) -> None:
    """Write `config.json` and the weights, in files of at most 5 GB, under Hugging Face's names.

    One weight after the other is put together and written, so that sharded ones are never whole at once.

    Args:
        fields: The `config.json`; its dtype is set to that of the weights.
        base: The checkpoint that the model comes from: what the model does not read of it, like the weights of a
            vision part, is written again as it was.
    """
    write_weights(outlines(model, base), all_weights(model, base), folder)
    fields = {k: v for k, v in fields.items() if k != "torch_dtype"} | {
        "dtype": str(model.dtype).removeprefix("torch.")
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_weights(weights: Iterable[Outline], tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write safetensors files of at most 5 GB, and an index if there are several.

    Args:
        weights: In the order of `widest_first`.
        tensors: In the same order. Each one is written before the next one is taken.
    """
    files: list[list[Outline]] = [[]]
    size = total = 0
    for weight in weights:
        if files[-1] and size + weight.size > SHARD:
            files.append([])
            size = 0
        files[-1].append(weight)
        size, total = size + weight.size, total + weight.size
    weight_map: dict[str, str] = {}
    for i, some in enumerate(files, start=1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        write_file(folder / name, some, itertools.islice(tensors, len(some)))
        weight_map |= {w.name: name for w in some}
    write_index(weight_map, total, folder)


def write_index(weight_map: dict[str, str], total: int, folder: Path) -> None:
    """The file that says which weight is in which file, where there are several.

    Args:
        total: Bytes of all weights.
    """
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, weights: Sequence[Outline], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a safetensors file: the length of a JSON object, that object, which says what lies where, and weights."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for w in weights:
        header[w.name] = {"dtype": w.kind, "shape": list(w.shape), "data_offsets": [end, end := end + w.size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for w, (name, tensor) in zip(weights, tensors, strict=True):
            assert (name, tuple(tensor.shape)) == (w.name, w.shape) and tensor.nbytes == w.size
            f.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def outlines(model: GPT, base: Optional[Checkpoint]) -> list[Outline]:
    """What `all_weights` yields."""
    own = [
        Outline(name, NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in hf_weights(model, lambda p: torch.empty(p.shape, dtype=p.dtype, device="meta"))
    ]
    wide, narrow = carried_over(model, base)
    return [*wide, *own, *narrow]


def all_weights(model: GPT, base: Optional[Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
    """`hf_weights`, and what is carried over from the checkpoint that the model comes from."""
    wide, narrow = carried_over(model, base)
    for weight in wide:
        yield weight.name, base.tensor(weight.name)  # type: ignore[union-attr]
    yield from hf_weights(model)
    for weight in narrow:
        yield weight.name, base.tensor(weight.name)  # type: ignore[union-attr]


def widest_first(weights: Iterable[Outline]) -> list[Outline]:
    """In the order in which a file holds them: each begins where a number of its size may begin."""
    return sorted(weights, key=lambda w: -w.item_size)


def carried_over(model: GPT, base: Optional[Checkpoint]) -> tuple[list[Outline], list[Outline]]:
    """What the model does not read: the numbers that are wider than the model's, which stand first in a file, and the
    others."""
    kept = name_table(model.config).kept
    names = [name for name in base.files if kept.search(name)] if base is not None else []
    found = widest_first(base.outline(name) for name in names)  # type: ignore[union-attr]
    wide = [w for w in found if w.item_size > model.dtype.itemsize]
    return wide, found[len(wide) :]


def hf_weights(model: GPT, get: Callable[[torch.Tensor], torch.Tensor] = full) -> Iterator[tuple[str, torch.Tensor]]:
    """The pretrained weights by their Hugging Face names, as they are stored; a tied head not at all.

    Args:
        get: Makes the whole weight from a parameter.
    """
    table, tied = name_table(model.config), tied_head(model.config)
    for name, (module, leaf) in base_parameters(model).items():
        if table.to_hf(name.rpartition(".")[0])[0] + f".{leaf}" == tied:
            continue
        weight = get(getattr(module, leaf)).detach()
        for hf, stored, rows in stored_pieces(table, name, module, leaf, weight):
            yield hf, stored.from_ours(rows)
