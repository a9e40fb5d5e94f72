"""A Hugging Face model folder: opened lazily, read into a model one tensor at a time, and checked before."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.families import name_table, read_config
from litgpt.files import read_json
from litgpt.model import GPT
from litgpt.quantize import QuantizedLinear

INDEX = "model.safetensors.index.json"
NUMBERS = ("F64", "F32", "F16", "BF16")  # in safetensors' words; whole numbers and 8 bits want scales, not a cast


class Checkpoint:
    """The weights and the configuration in a folder; opening it reads no weight.

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
            for name in sorted(f.keys()):
                view = f.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()
                self.files[name] = file

    def tensor(self, name: str) -> torch.Tensor:
        """One weight by its Hugging Face name. The file is opened for it alone, so that its pages are not kept."""
        with opened(self.files[name]) as f:
            return f.get_tensor(name)


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
        name = re.sub(r"\.linear$", "", path)
        for leaf in module._parameters:
            if leaf in ("weight", "bias") and module._parameters[leaf] is not None and table.to_hf(name):
                found[f"{name}.{leaf}"] = (module, leaf)
    return found


def load_weights(model: GPT, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model that was built on the meta device.

    Pretrained weights come from the checkpoint, one by one, as `dtype` or quantized from it; parameters that a method
    added are made as they are declared and drawn by their module's `reset_parameters`.

    Raises:
        UserError: the checkpoint lacks a weight, has one that the model does not know, or one of another shape; all
            of them at once. Or it has a tied head that differs from the embedding.
    """
    check_weights(model, checkpoint)
    table, slots = name_table(model.config), base_parameters(model)
    for module, leaf in slots.values():
        old = module._parameters[leaf]
        assert old is not None
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            continue
        empty = torch.empty_like(old, dtype=dtype, device=device)
        setattr(module, leaf, nn.Parameter(empty, requires_grad=old.requires_grad))
    for name in checkpoint.files:
        target = table.from_hf(name.rpartition(".")[0])
        if target is None:
            continue
        if is_tied(name, model.config):
            check_tied(checkpoint, name, f"{table.to_hf('transformer.wte')[0]}.weight")
            continue
        module, leaf = slots[f"{target[0]}.{name.rpartition('.')[2]}"]
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.store(target[1], checkpoint.tensor(name).to(device, dtype))
            continue
        rows = getattr(module, leaf).detach()
        rows.split(getattr(module, "parts", (len(rows),)))[target[1]].copy_(checkpoint.tensor(name))
    model.tie_weights()
    for module in model.modules():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.is_meta}
        for leaf, p in own.items():
            setattr(module, leaf, nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad))
        if own:
            module.reset_parameters()  # type: ignore[operator]


def check_weights(model: GPT, checkpoint: Checkpoint) -> None:
    """Raise `UserError` unless names and shapes in the checkpoint are those of the model."""
    table = name_table(model.config)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (module, leaf) in base_parameters(model).items():
        weight = getattr(module, leaf)
        hf = [f"{m}.{leaf}" for m in table.to_hf(name.rpartition(".")[0])]
        parts = getattr(module, "parts", None) or (len(weight),)
        wanted.update({n: (rows, *weight.shape[1:]) for n, rows in zip(hf, parts)})
    wanted = {n: shape for n, shape in wanted.items() if not is_tied(n, model.config)}
    problems = defaultdict(list)
    for name, shape in wanted.items():
        if name not in checkpoint.shapes:
            problems["missing"].append(name)
        elif checkpoint.shapes[name] != shape:
            problems["of another shape"].append(f"{name} {checkpoint.shapes[name]} instead of {shape}")
        elif checkpoint.dtypes[name] not in NUMBERS:
            problems["of a type that is not supported"].append(f"{name} {checkpoint.dtypes[name]}")
    for name in checkpoint.shapes:
        if name not in wanted and not table.unused.search(name) and not is_tied(name, model.config):
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


def is_tied(hf_name: str, config: Config) -> bool:
    """Whether this is the weight of a head that is the embedding."""
    return config.tie_embeddings and hf_name == "lm_head.weight"


SHARD = 5 * 10**9  # bytes that a file of weights holds at most


def write_model(model: GPT, fields: dict[str, Any], folder: Path) -> None:
    """Write `config.json` and the weights, in files of at most 5 GB, under Hugging Face's names.

    Args:
        fields: The `config.json`; its dtype is set to that of the weights.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in hf_weights(model):
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    many = len(shards) > 1
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if many:
        total = sum(t.nbytes for tensors in shards for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    fields = {k: v for k, v in fields.items() if k != "torch_dtype"} | {
        "dtype": str(model.dtype).removeprefix("torch.")
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def hf_weights(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """The pretrained weights by their Hugging Face names; fused ones in parts, a tied head not at all."""
    table = name_table(model.config)
    for name, (module, leaf) in base_parameters(model).items():
        weight = getattr(module, leaf).detach()
        parts = weight.split(getattr(module, "parts", (len(weight),)))
        for hf, part in zip(table.to_hf(name.rpartition(".")[0]), parts):
            if not is_tied(f"{hf}.{leaf}", model.config):
                yield f"{hf}.{leaf}", part
