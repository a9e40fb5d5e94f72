"""The tensors of a GGUF file: names, types, and their contents in llama.cpp's form, one at a time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Optional

import numpy as np
import torch

from litgpt.errors import UserError, require
from litgpt.export.architectures import Architecture
from litgpt.families import weight_map
from litgpt.families.weights import Weights
from litgpt.model.config import Config
from litgpt.model.rope import make_ropes

BLOCK = 2**24  # numbers that are converted at once
K_QUANTS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # and what replaces them for rows of another size
TYPES = {  # what --type names: the type of most weights
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
    "q8_0": "Q8_0",
    "q4_0": "Q4_0",
    "q4_k_m": "Q4_K",
    "q5_k_m": "Q5_K",
    "q6_k": "Q6_K",
}
PLAIN = ("F32", "F16", "BF16")
XIELU = ".mlp.act_fn."  # whose numbers are metadata
BUFFER = re.compile(r"(\.layers\.\d+)\.(?!linear_attn).*")  # the name of one has no other form in the table of names
CONV, DT_BIAS = ".conv1d.", (".dt_bias", ".dt_proj.bias")
UNQUANTIZED = (
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "shortconv.conv.weight",
    "ssm_conv1d.weight",
)  # small matrices that llama.cpp keeps in float32


@dataclass
class Tensor:
    """A tensor of a GGUF file.

    Args:
        name: Its name in the file.
        sources: The weights that it is made from, by the names of the family's table. Those of several experts are
            stacked.
        shape: With the rows first, as in torch.
        kind: The name of its type.
        fallback: The type that its rows do not fit, if there is one.
        rows: Those of its source that it has, if it does not have all.
        values: The contents, if they do not come from weights.
    """

    name: str
    sources: list[str]
    shape: tuple[int, ...]
    kind: str = "F32"
    fallback: str = ""
    rows: Optional[range] = None
    values: Optional[torch.Tensor] = None

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.rows is None else rows[self.rows.start : self.rows.stop]


def gguf_tensors(weights: Weights, found: Architecture, named: str) -> list[Tensor]:
    """The tensors of a file, without their contents.

    Args:
        weights: The model.
        named: The type of most weights, a key of `TYPES`.
    """
    config, names = weights.config, weight_map(weights.config)
    gguf = require("gguf", "export")
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    table = gguf.get_tensor_name_map(arch, config.n_layer)
    tensors: dict[str, Tensor] = {}
    for name in weights.files:
        if name == names.tied_head or names.unused.search(name) or names.kept.search(name) or XIELU in name:
            continue
        shape = weights.shapes[name]
        if buffer := names.find(name)[0]:
            shape = shape[-1:]
        shape = (shape[0], *shape[2:]) if CONV in name else shape
        ours, number = names.find(name.rpartition(".")[0])
        if ours and names.rules[ours][number].transposed and len(shape) == 2:
            shape = shape[::-1]
        if ours and ours.endswith(".conv") and len(shape) == 3:  # a convolution of each channel by itself
            shape = (shape[0], shape[2])
        fused = next((fused for fused in found.splits if fused in name), "")
        parts = found.splits.get(fused, (fused,))
        size = shape[0] // len(parts)
        for i, part in enumerate(parts):
            plain = BUFFER.sub(r"\1.mlp.gate.e_score_correction.bias", name) if buffer else name
            plain = stacked(plain.replace("language_model.", "", 1).replace(fused, part).replace(*DT_BIAS))
            theirs = table.get_name(plain, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise UserError(f"GGUF's architecture {found.name!r} has no name for the weight {name}.")
            rows = range(i * size, (i + 1) * size) if len(parts) > 1 else None
            tensor = Tensor(theirs, [], (size, *shape[1:]), rows=rows)
            tensors.setdefault(theirs, tensor).sources.append(name)
    for tensor in tensors.values():
        if len(tensor.sources) > 1:
            tensor.sources.sort(key=expert_of)
            tensor.shape = (len(tensor.sources), *tensor.shape)
    if config.tie_embeddings and not found.tied:
        embedding = tensors["token_embd.weight"]
        tensors["output.weight"] = Tensor("output.weight", embedding.sources, embedding.shape)
    made = list(tensors.values())
    choose_types(made, config, named)
    return [*rope_factors(config), *made]


def stacked(name: str) -> str:
    """The name of the tensor that stacks the experts, or the norms of the heads, that a weight belongs to."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in ("experts", "norms") and parts[i + 1].isdigit():
            return ".".join([*parts[: i + (part == "experts")], *parts[i + 2 :]])
    return name


def expert_of(name: str) -> int:
    parts = name.split(".")
    return next(int(parts[i + 1]) for i, part in enumerate(parts) if part in ("experts", "norms"))


def rope_factors(config: Config) -> list[Tensor]:
    """The tensors that slow each pair of dimensions down, for ropes that numbers alone do not describe."""
    if config.rope_type == "longrope":
        return [
            Tensor(f"rope_factors_{kind}.weight", [], (len(factors),), values=torch.tensor(factors))
            for kind in ("long", "short")
            for factors in [config.rope_adjustments[f"{kind}_factor"]]
        ]
    if config.rope_type != "llama3":
        return []
    (rope, *_), (plain, *_) = make_ropes(config), make_ropes(replace(config, rope_type="default", rope_adjustments={}))
    factors = plain.inverse[0] / rope.inverse[0]
    return [Tensor("rope_freqs.weight", [], tuple(factors.shape), values=factors)]


# types


def choose_types(tensors: list[Tensor], config: Config, named: str) -> None:
    """Set the type of each tensor, as llama.cpp's own quantization does. Rows that do not fit get another type."""
    require_quantization(named)
    for tensor in tensors:
        if len(tensor.shape) == 1 or tensor.name.endswith(UNQUANTIZED) or "norm" in tensor.name:
            continue
        tensor.kind = wanted = wanted_type(tensor.name, config, named)
        while tensor.shape[-1] % block_size(tensor.kind):
            tensor.kind = K_QUANTS.get(tensor.kind, "F16")
        tensor.fallback = wanted if tensor.kind != wanted else ""


def wanted_type(name: str, config: Config, named: str) -> str:
    kind = TYPES[named]
    head = name == "output.weight" or (config.tie_embeddings and name == "token_embd.weight")
    if kind == "Q4_0":
        return "Q8_0" if head else kind
    if kind not in K_QUANTS:
        return kind
    if head:
        return "Q6_K"
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if not named.endswith("_m"):
        return kind
    if ".attn_qkv." in name:  # one tensor for q, k, and v
        return {"Q4_K": "Q5_K", "Q5_K": "Q6_K"}[kind]
    if ".attn_v." in name or ".ffn_down" in name:
        return "Q6_K" if more_bits(layer, config.n_layer) else kind
    return kind


def more_bits(layer: int, n_layer: int) -> bool:
    """Whether llama.cpp's mixed types spend more bits on a layer: the first and last eighth, every third between."""
    first = n_layer // 8
    return layer < first or layer >= 7 * n_layer // 8 or (layer - first) % 3 == 2


def block_size(kind: str) -> int:
    """How many numbers of a row share a scale."""
    return 1 if kind in PLAIN else 256 if kind in K_QUANTS else 32


def require_quantization(named: str) -> None:
    if TYPES[named] in K_QUANTS:
        require("libgguf", "export")


def n_bytes(shape: tuple[int, ...], kind: str) -> int:
    gguf = require("gguf", "export")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // block * size


# contents


def contents(tensor: Tensor, weights: Weights, found: Architecture) -> Iterator[bytes]:
    """The bytes of a tensor, a few rows at a time."""
    return (encoded(tensor, rows) for rows in source_rows(tensor, weights, found))


def source_rows(tensor: Tensor, weights: Weights, found: Architecture) -> Iterator[torch.Tensor]:
    """The numbers of a tensor in float32, a few rows at a time."""
    read = weights.tensors(tensor.sources) if tensor.values is None else iter([("", tensor.values)])
    for name, weight in read:
        weight = weight if tensor.values is not None else tensor.part(arranged(name, weight, weights.config, found))
        n_columns = tensor.shape[-1]
        for rows in weight.reshape(-1, n_columns).split(max(1, BLOCK // n_columns)):
            yield rows.float()


def arranged(name: str, weight: torch.Tensor, config: Config, found: Architecture) -> torch.Tensor:
    """A weight as llama.cpp needs it. Like our model it has q, k, and v one after the other."""
    names = weight_map(config)
    if name.endswith(".A_log"):
        weight = -weight.float().exp()
    if names.find(name)[0]:  # a buffer
        return of_value_heads(name, weight.flatten(), config)
    ours, i = names.find(name.rpartition(".")[0])
    if names.rules[ours][i].transposed and weight.dim() == 2:
        weight = weight.T
    if config.norm_unit_offset and name.endswith("norm.weight") and ".linear_attn." not in name:
        return weight.float() + 1
    return arranged_columns(name, arranged_rows(name, weight, config, found), config)


def arranged_rows(name: str, rows: torch.Tensor, config: Config, found: Architecture) -> torch.Tensor:
    """The rows of a weight, or of an update of it, in llama.cpp's order."""
    names = weight_map(config)
    ours, i = names.find(name.rpartition(".")[0])
    order = names.rules[ours][i].rows
    if order is not None and "norms" not in name:  # of each head by itself
        rows = rows[order.argsort()]
    if found.interleaved and ours.endswith("attn.qkv") and i < 2:  # the halves of a head become neighbors
        pairs = rows.unflatten(0, (-1, 2, config.head_size // 2))
        return pairs.transpose(1, 2).reshape(rows.shape)
    return of_value_heads(name, rows, config)


def arranged_columns(name: str, columns: torch.Tensor, config: Config) -> torch.Tensor:
    """The columns of a weight, or of the first factor of an update of it, in llama.cpp's order."""
    return tiled(columns.T, config.linear_value_size, config).T if ".linear_attn.out_proj." in name else columns


def of_value_heads(name: str, rows: torch.Tensor, config: Config) -> torch.Tensor:
    """The rows of a weight of a gated delta net, those of its heads of values in llama.cpp's order."""
    module = name.partition(".linear_attn.")[2].partition(".")[0]
    if module in ("", "norm", "out_proj"):
        return rows
    size = config.linear_value_size if module in ("in_proj_qkv", "in_proj_z", "conv1d") else 1
    n_others = 2 * config.linear_key_heads * config.linear_key_size if module in ("in_proj_qkv", "conv1d") else 0
    return torch.cat([rows[:n_others], tiled(rows[n_others:], size, config)])


def tiled(rows: torch.Tensor, size: int, config: Config) -> torch.Tensor:
    """The first of the heads of values that belong to each head of keys come first, then the second, ..."""
    heads = rows.unflatten(0, (config.linear_key_heads, -1, size))
    return heads.transpose(0, 1).reshape(rows.shape)


def encoded(tensor: Tensor, rows: torch.Tensor) -> bytes:
    """Float32 rows as bytes of the tensor's type."""
    kind = tensor.kind
    if not rows.isfinite().all():
        raise UserError(f"The weight {tensor.sources[0]} has numbers that are not finite.")
    if kind == "F16" and rows.abs().amax() > torch.finfo(torch.float16).max:
        raise UserError(f"The weight {tensor.sources[0]} has numbers that are too large for f16. Use --type bf16.")
    if kind in PLAIN:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return rows.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    gguf, numbers = require("gguf", "export"), np.ascontiguousarray(rows.numpy())
    number = gguf.GGMLQuantizationType[kind]
    if kind in K_QUANTS:
        return require("libgguf", "export").quantize_rows_raw(int(number), numbers, *numbers.shape)
    return gguf.quants.quantize(numbers, number).tobytes()
