"""Writing a Hugging Face model folder: `config.json` and safetensors files of at most 5 GB."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.families import weight_map
from litgpt.families.weights import Outline, Weights
from litgpt.model import GPT
from litgpt.model.sharded import full_tensor
from litgpt.storage.torch_file import NAMES

INDEX = "model.safetensors.index.json"
SHARD = 5 * 10**9  # maximum bytes of a file of weights


def write_model(model: GPT, fields: dict[str, Any], folder: Path, base: Optional[Weights] = None) -> None:
    """Write `config.json` and the weights, in files of at most 5 GB, under Hugging Face's names.

    Weights are gathered and written one at a time, so that sharded ones are never all in memory.

    Args:
        fields: The `config.json`; its dtype is set to that of the weights.
        base: The checkpoint that the model comes from. What the model does not read of it, like a vision part, is
            copied unchanged.
    """
    meta = hf_weights(model, lambda p: torch.empty(p.shape, dtype=p.dtype, device="meta"))
    own = [Outline(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in meta]
    kept = weight_map(model.config).kept
    carried = widest_first(base.outline(n) for n in base.files if kept.search(n)) if base is not None else []
    wide = [w for w in carried if w.item_size > model.dtype.itemsize]
    narrow = carried[len(wide) :]

    def copied(weights: list[Outline]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((w.name, base.tensor(w.name)) for w in weights)  # type: ignore[union-attr]

    tensors = itertools.chain(copied(wide), hf_weights(model), copied(narrow))
    write_weights([*wide, *own, *narrow], tensors, folder)
    fields = {k: v for k, v in fields.items() if k != "torch_dtype"}
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_weights(weights: Iterable[Outline], tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write safetensors files of at most 5 GB, and an index if there are several.

    The weights come in the order of `widest_first`, and so do their tensors. Each is written before the next is taken.
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
    """Write the index that maps weights of `total` bytes to files, if there are several files."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, weights: Sequence[Outline], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a safetensors file: the length of a JSON header, the header with the offsets, and the weights."""
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


def widest_first(weights: Iterable[Outline]) -> list[Outline]:
    """The order of weights in a file, in which each is aligned to the size of its numbers."""
    return sorted(weights, key=lambda w: -w.item_size)


def hf_weights(
    model: GPT, get: Callable[[torch.Tensor], torch.Tensor] = full_tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The pretrained weights in their stored form, by their Hugging Face names, without a tied head. `get` returns the
    full weight of a parameter."""
    names = weight_map(model.config)
    for parameter in names.parameters(model).values():
        tensors = parameter.tensors
        if tensors[0].name == names.tied_head:
            continue
        weight = get(parameter.value).detach()
        for tensor in tensors:
            yield tensor.name, tensor.form.from_ours(weight[tensor.rows])
