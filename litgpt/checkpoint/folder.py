"""A Hugging Face model folder: checked, opened lazily, read into a model one tensor at a time, and written."""

import itertools
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from litgpt.errors import UserError
from litgpt.families import aliases, read_config, weight_map
from litgpt.families.mxfp4 import BLOCKS, SCALES, dequantized, is_mxfp4
from litgpt.families.table import Aliases, Parameter
from litgpt.families.weights import KINDS, READ, Outline, Weights, check_count, check_tied, check_weights, is_tied
from litgpt.litgpt_format.folder import MODEL, LitCheckpoint, has_hf_weights, notify
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.linear import PartwiseLinear
from litgpt.model.sharded import full_tensor, is_sharded, local_shard, put, unsharded
from litgpt.storage.files import is_there, read_json
from litgpt.storage.torch_file import NAMES, TYPES, TorchFile

INDEX = "model.safetensors.index.json"
SHARD = 5 * 10**9  # maximum bytes of a file of weights
PART = 2**26  # bytes of a tensor that are converted at a time


class Checkpoint(Weights):
    """The weights and the configuration in a folder. Opening it reads no weights.

    Weights have the names of the family's table, even if the files have other names or stacks of experts. A folder has
    `config.json` and `model.safetensors` or `pytorch_model.bin`, or an index with its shards. Raises `UserError` if
    something is missing, truncated, or not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not is_there(folder / "config.json"):
            trained = folder / "final"  # of an output folder of training
            hint = f" Did you mean '{trained}'?" if trained.is_dir() else ""
            raise UserError(f"{folder} is not a Hugging Face model folder: it has no config.json.{hint}")
        self.fields: dict[str, Any] = read_json(folder / "config.json")
        if is_mxfp4(self.fields):  # `tensors` returns dequantized weights
            self.fields = {key: value for key, value in self.fields.items() if key != "quantization_config"}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors names them: F32, BF16, ...
        self.files: dict[str, Path] = {}
        self.places: dict[str, tuple[str, Optional[tuple]]] = {}  # the name in the file, and the index in that tensor
        self.scales: dict[str, Path] = {}  # the files of the scales of MXFP4 weights
        self.aliases = aliases(self.fields.get("model_type"))
        for file in self.shards():
            self.read_header(file)

    @cached_property
    def config(self) -> Config:  # type: ignore[override]
        """Raises `UserError` if the family is unknown or the math is not implemented."""
        try:
            config = read_config(self.fields, name=self.folder.name)
            check_count(config, len(self.shapes))
            if "tie_word_embeddings" not in self.fields and not is_tied(self, weight_map(config)):
                config.tie_embeddings = False  # the weights tell what the file leaves out, as in transformers
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
                raise UserError(f"{index_file} lists files outside its folder, or none.")
        else:
            names = [kind]
        # Path.is_file raises for a name that is too long
        missing = [n for n in names if not os.path.isfile(self.folder / n)]
        if missing:
            raise UserError(f"{self.folder} has no {', '.join(missing)}. The download is incomplete.")
        return [self.folder / n for n in names]

    def read_header(self, file: Path) -> None:
        with opened(file) as f:
            for stored in sorted(f.keys()):
                view = f.get_slice(stored)
                whole, dtype, of = tuple(view.get_shape()), view.get_dtype(), stored
                if dtype == "U8" and stored.endswith(SCALES):
                    self.scales[stored] = file
                    continue
                if dtype == "U8" and stored.endswith(BLOCKS) and len(whole) == 4:
                    n, rows, blocks, size = whole
                    whole, dtype, of = (n, blocks * size * 2, rows), "BF16", stored.removesuffix(BLOCKS)
                for name, shape, index in self.aliases.expand(of, whole):
                    self.shapes[name], self.dtypes[name] = shape, dtype
                    self.files[name], self.places[name] = file, (stored, index)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield weights with their names. A file stays open while the next weight is in it. After 256 MB it is
        opened again, because its pages stay in memory until it is closed."""
        waiting = deque(names)
        while waiting:
            file, n_bytes = self.files[waiting[0]], 0
            with opened(file) as f:
                while waiting and self.files[waiting[0]] == file and n_bytes < READ:
                    name = waiting.popleft()
                    stored, index = self.places[name]
                    if self.is_packed(name):
                        tensor = self.unpacked(f, name)
                    else:
                        tensor = f.get_tensor(stored) if index is None else f.get_slice(stored)[index]
                    n_bytes += tensor.nbytes
                    yield name, tensor

    def is_packed(self, name: str) -> bool:
        stored, index = self.places[name]
        return stored.endswith(BLOCKS) and self.dtypes[name] == "BF16" and index is not None

    def unpacked(self, f: Any, name: str) -> torch.Tensor:
        """An expert's weight in MXFP4, whose blocks are in the open file `f`."""
        stored, index = self.places[name]
        scales = stored.removesuffix(BLOCKS) + SCALES
        if index is None or scales not in self.scales:
            raise UserError(f"{self.folder} has {stored} without {scales}.")
        with opened(self.scales[scales]) as other:
            found = dequantized(f.get_slice(stored)[index[0]], other.get_slice(scales)[index[0]])
        return found.T

    def part(self, name: str, dim: int, ranges: Sequence[range]) -> torch.Tensor:
        """Reads nothing else of the file, except for MXFP4 weights."""
        if self.is_packed(name):
            return super().part(name, dim, ranges)
        stored, index = self.places[name]
        with opened(self.files[name]) as f:
            view = f.get_slice(stored)
            expert, rows = index or ((), slice(0, self.shapes[name][0]))
            parts = []
            for part in ranges:
                cut = slice(part.start, part.stop)
                first = slice(rows.start + part.start, rows.start + part.stop) if dim == 0 else rows
                indices = (first,) if dim == 0 else (first, cut)
                parts.append(view[(expert, *indices) if index else indices])
        return torch.cat(parts, dim)


class Overlaid(Weights):
    """A checkpoint with tensors, by their names in the family's table, that replace some of its own or are added to
    them. They are written with the types of the base. Their model may have another number of embeddings, and an untied
    head."""

    def __init__(self, base: Weights, replaced: dict[str, torch.Tensor], config: Config) -> None:
        self.base, self.replaced = base, replaced
        self.folder, self.config = base.folder, config
        self.shapes = base.shapes | {name: tuple(tensor.shape) for name, tensor in replaced.items()}
        names = weight_map(config)  # an untied head has the type of the embedding
        self.dtypes = dict.fromkeys(replaced, base.dtypes.get(names.embedding, "F32")) | base.dtypes
        self.files = dict.fromkeys(replaced, base.folder) | base.files
        for known in (self.shapes, self.dtypes, self.files):  # the base may store a tied head too
            known.pop(names.tied_head, None)

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
    """A `config.json` with the new number of embeddings and the new tying of the head, if these have changed."""
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
        raise UserError(f"{file} is damaged or truncated ({str(e).splitlines()[0]}). Download it again.") from e


def load_weights(
    model: GPT, checkpoint: Weights, dtype: torch.dtype, device: torch.device, shards: Optional[torch.device] = None
) -> None:
    """Fill a model that was built on the meta device.

    Pretrained weights come from the checkpoint, one by one, as `dtype` or quantized from it. Parameters that a method
    added keep their declared type and are initialized by their module's `reset_parameters`. Sharded weights go to the
    device `shards`, by default `device`.

    Raises:
        UserError: weights are missing, unknown, or have another shape; the message lists all of them. Or a tied head
            differs from the embedding.
    """
    check_weights(model, checkpoint)
    names = weight_map(model.config)
    parameters = names.parameters(model)
    kept = kept_weights.get() or KeptWeights()
    kept.begin((type(checkpoint), checkpoint.folder, dtype, device))
    missing = {name: parameter for name, parameter in parameters.items() if not kept.give(parameter)}
    for _, module, leaf, stored in missing.values():
        if leaf in module._buffers:
            module._buffers[leaf] = torch.empty_like(getattr(module, leaf), device=device)
            continue
        old = module._parameters[leaf]
        assert old is not None
        if isinstance(module, PartwiseLinear) and leaf == "weight":
            module.begin(len(stored))  # one part per Hugging Face tensor
            continue
        empty = empty_like(old, dtype, shards if shards and is_sharded(old) else device)
        setattr(module, leaf, nn.Parameter(empty, requires_grad=old.requires_grad))
    check_tied(checkpoint, names)
    fill_weights(model, checkpoint, missing)
    model.tie_weights()
    if not isinstance(checkpoint, Overlaid) and not shards:
        kept.take(parameters.values())
    for module in model.modules():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.is_meta}
        for leaf, p in own.items():
            setattr(module, leaf, nn.Parameter(empty_like(p, p.dtype, device), requires_grad=p.requires_grad))
        if own:
            with unsharded(module):
                module.reset_parameters()  # type: ignore[operator]
    model.stack_experts()


@dataclass
class KeptWeights:
    """The frozen weights of the last model that was loaded from a folder. The next model from the same folder gets them
    without reading them."""

    origin: Any = None
    weights: dict[tuple, Any] = field(default_factory=dict)

    def begin(self, origin: Any) -> None:
        if origin != self.origin:
            self.origin = origin
            self.weights.clear()

    def key(self, parameter: Parameter) -> tuple:
        return parameter.name, getattr(parameter.module, "scheme", None)

    def give(self, parameter: Parameter) -> bool:
        """Put a weight where it belongs. Returns False if there is none, or if it is to be trained."""
        _, module, leaf, _ = parameter
        old, kept = module._parameters.get(leaf), self.weights.get(self.key(parameter))
        if kept is None or old is None or old.requires_grad:
            return False
        if isinstance(module, PartwiseLinear) and leaf == "weight":
            module.stored, module.weight = [*kept], None  # type: ignore[assignment]
        else:
            setattr(module, leaf, kept)
        return True

    def take(self, parameters: Iterable[Parameter]) -> None:
        for parameter in parameters:
            _, module, leaf, _ = parameter
            value = module._parameters.get(leaf)
            if isinstance(module, PartwiseLinear) and leaf == "weight":
                self.weights[self.key(parameter)] = [*module.stored]
            elif value is not None and not value.requires_grad and not is_sharded(value):
                self.weights[self.key(parameter)] = value


kept_weights: ContextVar[Optional[KeptWeights]] = ContextVar("kept_weights", default=None)


def empty_like(p: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor like one on the meta device. Only sharded ones use torch's function of this name, which imports a
    part of its compiler and so takes a third of a second."""
    if is_sharded(p):
        return torch.empty_like(p, dtype=dtype, device=device)
    return torch.empty(p.shape, dtype=dtype, device=device)


def fill_weights(model: GPT, checkpoint: Weights, parameters: dict[str, Parameter]) -> None:
    """Read pretrained weights from the checkpoint into these parameters, as `WeightMap.parameters` returns them."""
    tied_head = weight_map(model.config).tied_head
    targets = {
        target.name: (parameter, i, target)
        for parameter in parameters.values()
        for i, target in enumerate(parameter.tensors)
        if target.name != tied_head
    }
    for name, tensor in checkpoint.tensors(name for name in checkpoint.files if name in targets):
        parameter, i, target = targets[name]
        tensor = target.form.to_ours(tensor)
        if isinstance(parameter.module, PartwiseLinear) and parameter.leaf == "weight":
            parameter.module.store(i, tensor.to(model.device, model.dtype))
        else:
            put(parameter.value.detach(), target.rows.start, tensor)


def open_checkpoint(folder: Path) -> Weights:
    """The model in a folder, in Hugging Face's form or, if it has only that, in LitGPT's. Raises `UserError` if the
    folder has neither, or is damaged."""
    if not (folder / MODEL).is_file():
        return Checkpoint(folder)
    if not has_hf_weights(folder):
        return LitCheckpoint(folder)
    notify(f"{folder} has a model in Hugging Face's form and one in LitGPT's. Ignoring {MODEL}.")
    return Checkpoint(folder)


# writing


def result_dtypes(model: GPT, base: Weights) -> dict[str, torch.dtype]:
    """The dtype of each pretrained parameter of a trained model in its folder: that of the base's tensors, unless the
    model's is narrower."""
    kinds, dtypes = {kind: dtype for dtype, kind in NAMES.items()}, {}
    for name, parameter in weight_map(model.config).parameters(model).items():
        stored = [kinds[base.dtypes[tensor.name]] for tensor in parameter.tensors if tensor.name in base.dtypes]
        own = parameter.value.dtype
        dtypes[name] = min(own, max(stored, key=bytes_of, default=own), key=bytes_of)
    return dtypes


def bytes_of(dtype: torch.dtype) -> int:
    return dtype.itemsize


@torch.no_grad()
def round_weights(model: GPT, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round parameters to values of these dtypes, in place. Their own dtypes stay."""
    for name, parameter in weight_map(model.config).parameters(model).items():
        own = local_shard(parameter.value)
        if dtypes[name] != own.dtype:
            own.copy_(own.to(dtypes[name]))


def write_model(
    model: GPT,
    fields: dict[str, Any],
    folder: Path,
    base: Optional[Weights] = None,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Write `config.json` and the weights, in files of at most 5 GB, under Hugging Face's names.

    Weights are gathered and written one at a time, so that sharded ones are never all in memory.

    Args:
        fields: The `config.json`; its dtype is set to that of the weights.
        base: The checkpoint that the model comes from. What the model does not read of it, like a vision part, is
            copied unchanged.
        dtypes: Dtypes to store parameters in, by our names, instead of their own.
    """
    meta = hf_weights(model, lambda p: torch.empty(p.shape, dtype=p.dtype, device="meta"), dtypes)
    own = [Outline(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in meta]
    kept = weight_map(model.config).kept
    carried = widest_first(base.outline(n) for n in base.files if kept.search(n)) if base is not None else []
    wide = [w for w in carried if w.item_size > own[-1].item_size]
    narrow = carried[len(wide) :]

    def copied(weights: list[Outline]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((w.name, base.tensor(w.name)) for w in weights)  # type: ignore[union-attr]

    tensors = itertools.chain(copied(wide), hf_weights(model, dtypes=dtypes), copied(narrow))
    write_weights([*wide, *own, *narrow], tensors, folder, model.config)
    fields = {k: v for k, v in fields.items() if k != "torch_dtype"}
    fields["dtype"] = str(dtypes.get("transformer.wte.weight", model.dtype)).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_weights(
    weights: Iterable[Outline],
    tensors: Iterator[tuple[str, torch.Tensor]],
    folder: Path,
    config: Config,
    shard: Optional[int] = None,
) -> None:
    """Write safetensors files of at most `shard` bytes, by default 5 GB, and an index if there are several.

    The weights come in the order of `widest_first`, and so do their tensors. Each is written before the next is taken,
    except for the experts of a layer in families that stack them.
    """
    weights, tensors = in_files(list(weights), tensors, aliases(config.model_type))
    files: list[list[Outline]] = [[]]
    size = total = 0
    for weight in weights:
        if files[-1] and size + weight.size > (shard or SHARD):
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


def in_files(
    weights: list[Outline], tensors: Iterator[tuple[str, torch.Tensor]], names: Aliases
) -> tuple[list[Outline], Iterator[tuple[str, torch.Tensor]]]:
    """The weights of the table in the form that the family's files have: experts in stacks."""
    places = [names.stacked(w.name) for w in weights]
    last = {name: i for i, (name, _) in enumerate(places)}  # a stack is complete after its last part
    count = Counter(name for name, _ in places)
    outlines = [
        Outline(name, w.kind, w.shape if index is None else (count[name], *w.shape))
        for i, (w, (name, index)) in enumerate(zip(weights, places))
        if last[name] == i
    ]

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        parts: dict[str, dict[Optional[int], torch.Tensor]] = defaultdict(dict)
        for i, ((name, index), (_, tensor)) in enumerate(zip(places, tensors, strict=True)):
            parts[name][index] = tensor
            if last[name] == i:
                found = parts.pop(name)
                yield name, tensor if index is None else torch.stack([found[i] for i in range(count[name])])

    return outlines, read()


def write_index(weight_map: dict[str, str], total: int, folder: Path) -> None:
    """Write the index that maps weights of `total` bytes to files, if there are several files."""
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, weights: Sequence[Outline], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a safetensors file: the length of a JSON header, the header with the offsets, and the weights, which are
    converted to their types some rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for w in weights:
        header[w.name] = {"dtype": w.kind, "shape": list(w.shape), "data_offsets": [end, end := end + w.size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for w, (name, tensor) in zip(weights, tensors, strict=True):
            assert (name, tuple(tensor.shape)) == (w.name, w.shape)
            is_known = NAMES.get(tensor.dtype) == w.kind or w.kind not in TYPES  # such as 8 bits, which are only copied
            parts = [tensor] if is_known else (part.to(TYPES[w.kind]) for part in parts_of(tensor))
            n_bytes = 0
            for part in parts:
                n_bytes += part.nbytes
                f.write(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
            assert n_bytes == w.size


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in parts along its first dimension, of at most 64 MB if possible."""
    if tensor.dim() == 0 or not len(tensor):
        return iter([tensor])
    return iter(tensor.split(max(1, PART * len(tensor) // max(tensor.nbytes, 1))))


def widest_first(weights: Iterable[Outline]) -> list[Outline]:
    """The order of weights in a file, in which each is aligned to the size of its numbers."""
    return sorted(weights, key=lambda w: -w.item_size)


def hf_weights(
    model: GPT,
    get: Callable[[torch.Tensor], torch.Tensor] = full_tensor,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Iterator[tuple[str, torch.Tensor]]:
    """The pretrained weights in their stored form, by their Hugging Face names, without a tied head, the widest first.
    `get` returns the full weight of a parameter. `dtypes` as for `write_model`."""
    names = weight_map(model.config)
    parameters = [(dtypes.get(name, p.value.dtype), p) for name, p in names.parameters(model).items()]
    for dtype, parameter in sorted(parameters, key=lambda pair: -bytes_of(pair[0])):
        tensors = parameter.tensors
        if tensors[0].name == names.tied_head:
            continue
        weight = get(parameter.value).detach().to(dtype)
        for tensor in tensors:
            yield tensor.name, tensor.form.from_ours(weight[tensor.rows])
