"""A Hugging Face model folder: opened lazily, read into a model one tensor at a time, and checked before."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.families import aliases, name_table, read_config
from litgpt.families.table import NameTable, Stored
from litgpt.files import read_json
from litgpt.model import GPT
from litgpt.quantize import QuantizedLinear

INDEX = "model.safetensors.index.json"
NUMBERS = ("F64", "F32", "F16", "BF16")  # in safetensors' words; whole numbers and 8 bits want scales, not a cast


class Checkpoint:
    """The weights and the configuration in a folder; opening it reads no weight.

    Weights go by the names of the family's table, also where the files have other names or stacks of experts.

    Args:
        folder: Has `config.json` and either `model.safetensors` or an index with its shards.

    Raises:
        UserError: something is missing, cut short, or of a kind that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: it is no Hugging Face model folder.")
        self.fields = read_json(folder / "config.json")
        if not isinstance(self.fields, dict):
            raise UserError(f"{folder / 'config.json'} is no JSON object.")
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
            return read_config(self.fields, name=self.folder.name)
        except UserError as e:
            raise UserError(f"{self.folder}: {e}") from e

    def shards(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX)
            files = index.get("weight_map") if isinstance(index, dict) else None
            listed = list(files.values()) if isinstance(files, dict) else []
            if not listed or any(not isinstance(n, str) or Path(n).name != n for n in listed):
                raise UserError(f"{self.folder / INDEX} does not list files of its own folder.")
            names = sorted(set(listed))
        else:
            names = ["model.safetensors"]
        missing = [n for n in names if not (self.folder / n).is_file()]
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

    def tensor(self, name: str) -> torch.Tensor:
        """One weight by its Hugging Face name. The file is opened for it alone, so that its pages are not kept."""
        stored, index = self.places[name]
        with opened(self.files[name]) as f:
            return f.get_tensor(stored) if index is None else f.get_slice(stored)[index]


def opened(file: Path) -> Any:
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


def stored_pieces(table: NameTable, name: str, module: nn.Module, leaf: str) -> list[tuple[str, Stored, torch.Tensor]]:
    """How a parameter of ours is stored: each Hugging Face tensor's name, its form, and our rows that it holds.

    Args:
        name: Our name of the parameter, as in `base_parameters`.
    """
    weight = getattr(module, leaf).detach()
    pieces = table.pieces(name.rpartition(".")[0], getattr(module, "parts", None) or (len(weight),))
    rows = weight.split([n for _, n in pieces])
    return [(f"{stored.module}.{leaf}", stored, part) for (stored, _), part in zip(pieces, rows)]


def load_weights(model: GPT, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model that was built on the meta device.

    Pretrained weights come from the checkpoint, one by one, as `dtype` or quantized from it; parameters that a method
    added are made as they are declared and drawn by their module's `reset_parameters`.

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
        empty = torch.empty_like(old, dtype=dtype, device=device)
        setattr(module, leaf, nn.Parameter(empty, requires_grad=old.requires_grad))
    if tied in checkpoint.files:
        check_tied(checkpoint, tied, f"{table.to_hf('transformer.wte')[0]}.weight")
    fill_weights(model, checkpoint, slots)
    model.tie_weights()
    for module in model.modules():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.is_meta}
        for leaf, p in own.items():
            setattr(module, leaf, nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad))
        if own:
            module.reset_parameters()  # type: ignore[operator]


def fill_weights(model: GPT, checkpoint: Checkpoint, slots: dict[str, tuple[nn.Module, str]]) -> None:
    """Read pretrained weights from the checkpoint into their places.

    Args:
        slots: Those that are wanted, as `base_parameters` has them.
    """
    table, tied = name_table(model.config), tied_head(model.config)
    for name in checkpoint.files:
        target = table.from_hf(name.rpartition(".")[0])
        ours = f"{target[0]}.{name.rpartition('.')[2]}" if target is not None else ""
        if target is None or name == tied or ours not in slots:
            continue
        module, leaf = slots[ours]
        _, stored, rows = stored_pieces(table, ours, module, leaf)[target[1]]
        tensor = stored.to_ours(checkpoint.tensor(name))
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.store(target[1], tensor.to(model.device, model.dtype))
        else:
            rows.copy_(tensor)


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


def write_model(model: GPT, fields: dict[str, Any], folder: Path, base: Optional[Checkpoint] = None) -> None:
    """Write `config.json` and the weights, in files of at most 5 GB, under Hugging Face's names.

    Args:
        fields: The `config.json`; its dtype is set to that of the weights.
        base: The checkpoint that the model comes from: what the model does not read of it, like the weights of a
            vision part, is written again as it was.
    """
    files: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        file = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file({n: t.contiguous().cpu() for n, t in shard.items()}, file, metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in all_weights(model, base):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files, start=1):
        last = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (folder / f"model-{i:05d}.safetensors").rename(folder / last)
        weight_map |= dict.fromkeys(names, last)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    fields = {k: v for k, v in fields.items() if k != "torch_dtype"} | {
        "dtype": str(model.dtype).removeprefix("torch.")
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def all_weights(model: GPT, base: Optional[Checkpoint]) -> Iterator[tuple[str, torch.Tensor]]:
    """`hf_weights`, and what is carried over from the checkpoint that the model comes from."""
    yield from hf_weights(model)
    kept = name_table(model.config).kept
    for name in base.files if base is not None else ():
        if kept.search(name):
            assert base is not None
            yield name, base.tensor(name)


def hf_weights(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """The pretrained weights by their Hugging Face names, as they are stored; a tied head not at all."""
    table, tied = name_table(model.config), tied_head(model.config)
    for name, (module, leaf) in base_parameters(model).items():
        for hf, stored, rows in stored_pieces(table, name, module, leaf):
            if hf != tied:
                yield hf, stored.from_ours(rows)
