"""LitGPT's folders: `lit_model.pth` has the weights, `model_config.yaml` describes the model.

Its weights have our names with two exceptions. Gate and up are two layers there, `fc_1` and `fc_2`. In older files q, k
and v are one tensor, `attn.attn`, that holds for each key-value head its queries, its key and its value.

Finetuning writes `lit_model.pth.lora`, `.adapter` or `.adapter_v2`, and `hyperparameters.yaml`.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.families import check, read_config, weight_map, write_config
from litgpt.families.table import Parameter, Stored, rows_by_group, without_wrappers
from litgpt.families.weights import KINDS, READ, Weights, check_count, check_tied, check_weights
from litgpt.model.config import Config, differences
from litgpt.model.gpt import GPT
from litgpt.storage.files import is_there, read_json, read_yaml
from litgpt.storage.torch_file import NAMES, read
from litgpt.text.tokenizer import Tokenizer

MODEL, MODEL_CONFIG = "lit_model.pth", "model_config.yaml"
SETTINGS = "hyperparameters.yaml"
ADAPTERS = (f"{MODEL}.lora", f"{MODEL}.adapter", f"{MODEL}.adapter_v2")
Blocks = dict[int, tuple[torch.Tensor, torch.Tensor]]  # A and B by the index of a layer's block


@dataclass
class StoredRows:
    """Where LitGPT's file has the rows of a Hugging Face tensor."""

    names: list[str]  # the tensors that, concatenated, have them
    order: Optional[torch.Tensor]  # for each row in the file, the index of our row; None if the order is the same
    rows: slice  # the rows of ours that the Hugging Face tensor holds
    form: Stored  # how it holds them


class LitCheckpoint(Weights):
    """`Weights` in LitGPT's form, under their Hugging Face names.

    `model_config.yaml` describes the model. A `config.json` beside it is used if it describes the same one. Raises
    `UserError` if something is missing, truncated, does not fit, or contains code to run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / MODEL
        if not is_there(folder / MODEL_CONFIG):
            raise UserError(f"{folder} has {MODEL}, but no {MODEL_CONFIG} that describes the model.")
        config = Config.from_file(folder / MODEL_CONFIG)
        config.name = folder.name
        self.weights, self.n_bytes_read = read_pth(self.file), 0
        try:
            check(config)
            check_count(config, len(self.weights))
        except UserError as e:
            raise UserError(str(e).replace("config.json", str(folder / MODEL_CONFIG))) from e
        config.tie_embeddings = self.is_tied()
        self.without_fields: Optional[UserError] = None
        try:
            self.written = self.own_fields(config) or write_config(config)
            config = read_config(self.written, folder.name)
        except UserError as e:  # it runs, but no Hugging Face folder can describe it
            self.without_fields = e
        self.config = config
        self.shapes, self.dtypes, self.files = {}, {}, {}
        self.sources: dict[str, StoredRows] = {}
        self.find_sources()

    def shards(self) -> list[Path]:
        return [self.file]

    def is_tied(self) -> bool:
        """Whether the head is the embedding. LitGPT stores both even if they are the same."""
        head, embedding = self.weights.get("lm_head.weight"), self.weights.get("transformer.wte.weight")
        if head is None or embedding is None or head.shape != embedding.shape or not len(head):
            return False
        return torch.equal(head[0], embedding[0]) and torch.equal(head, embedding)

    def own_fields(self, config: Config) -> dict[str, Any]:
        """The folder's `config.json`, if it has one that describes the same model."""
        file = self.folder / "config.json"
        if not is_there(file):
            return {}
        fields = read_json(file)
        if "vision_config" in fields:  # that part is missing
            return {}
        try:
            other = differences(config, read_config(fields))
        except UserError as e:
            other = [str(e)]
        if other:
            notify(f"Ignoring {file}, which does not describe the model in {MODEL_CONFIG} ({', '.join(other)}).")
            return {}
        return fields | {"tie_word_embeddings": config.tie_embeddings}

    @cached_property
    def fields(self) -> dict[str, Any]:  # type: ignore[override]
        """The `config.json` of the model as a Hugging Face folder. Raises `UserError` if none can describe it."""
        if self.without_fields is not None:
            raise UserError(f"{self.folder} cannot become a Hugging Face folder. {self.without_fields}")
        ids: dict[str, Any] = {}
        if not any(f"{kind}_token_id" in self.written for kind in ("bos", "eos")):
            try:
                tokenizer = Tokenizer(self.folder)
            except UserError:
                pass
            else:
                stops = sorted(tokenizer.stop_ids)
                ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id}
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in self.weights.values()})
        written = {k: v for k, v in self.written.items() if k != "torch_dtype"}
        return written | ids | ({"dtype": dtypes[0]} if len(dtypes) == 1 else {})

    def find_sources(self) -> None:
        """Find what holds each Hugging Face tensor. Raises `UserError` unless names and shapes fit the config."""
        names, expected = weight_map(self.config), dict[str, tuple[int, ...]]()
        with torch.device("meta"):
            model = GPT(self.config)
        for parameter in names.parameters(model).values():
            sizes, order = lit_tensors(parameter), None
            old = parameter.name.replace(".attn.qkv.", ".attn.attn.")
            if old != parameter.name and old in self.weights:
                sizes, order = {old: len(parameter.value)}, group_order(self.config)
            expected |= {n: (size, *parameter.value.shape[1:]) for n, size in sizes.items()}
            tensors, theirs = parameter.tensors, list(sizes)
            if tensors[0].name == names.tied_head:
                continue
            dtype = self.weights[theirs[0]].dtype if theirs[0] in self.weights else torch.float32
            for i, (hf, form, rows) in enumerate(tensors):
                alone = StoredRows([theirs[i]], order, slice(None), form) if len(tensors) == len(theirs) else None
                self.sources[hf] = alone or StoredRows(theirs, order, rows, form)
                self.shapes[hf] = parameter.shape(tensors[i])
                self.files[hf] = self.file
                self.dtypes[hf] = NAMES.get(dtype, str(dtype))
        found = {n: tuple(t.shape) for n, t in self.weights.items()}
        wrong = [f"{n} is missing" for n in expected if n not in found]
        wrong += [f"{n} is unknown" for n in found if n not in expected]
        wrong += [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s]
        if wrong:
            raise UserError(f"{self.file} does not match its {MODEL_CONFIG}: {'; '.join(wrong)}.")

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            if self.n_bytes_read > READ:
                self.weights, self.n_bytes_read = read_pth(self.file), 0
            source = self.sources[name]
            tensors = [self.weights[n] for n in source.names]
            self.n_bytes_read += sum(t.nbytes for t in tensors)
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            tensor = tensor if source.order is None else tensor[source.order.argsort()]
            yield name, source.form.from_ours(tensor[source.rows]).contiguous()


def to_lit(checkpoint: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model under LitGPT's names, in its form; a tied head is the embedding's tensor again. Raises
    `UserError` if the weights do not fit the model."""
    names = weight_map(checkpoint.config)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    check_weights(model, checkpoint)
    check_tied(checkpoint, names)
    embedding = torch.empty(0)
    parameters = names.parameters(model).values()
    for parameter in sorted(parameters, key=lambda p: p.name != "transformer.wte.weight"):
        if parameter.tensors[0].name == names.tied_head:
            yield parameter.name, embedding
            continue
        parts = [tensor.form.to_ours(checkpoint.tensor(tensor.name)) for tensor in parameter.tensors]
        sizes = lit_tensors(parameter)
        if len(parts) != len(sizes):
            parts = list(torch.cat(parts).split(list(sizes.values())))
        if parameter.name == "transformer.wte.weight":
            embedding = parts[0]
        for name, part in zip(sizes, parts):
            yield name, part.clone() if len(parts) > 1 else part.contiguous()


def has_hf_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(
        (folder / f"{kind}{end}").is_file() for kind in KINDS for end in ("", ".index.json")
    )


@cache
def notify(message: str) -> None:
    """Print a message once per process."""
    print(f"litgpt: {message}", file=sys.stderr)


def lit_modules(ours: str, module: Any) -> list[str]:
    """The modules of LitGPT that hold a module of ours, in the order of its rows."""
    gated = ours.endswith(".fc") and len(getattr(module, "parts", ())) == 2
    return [f"{ours}_1", f"{ours}_2"] if gated else [ours]


def lit_tensors(parameter: Parameter) -> dict[str, int]:
    """The tensors of LitGPT that hold a parameter of ours, in the order of its rows, and the rows of each."""
    modules = lit_modules(parameter.name.rpartition(".")[0], parameter.module)
    sizes: Any = parameter.module.parts if len(modules) > 1 else [len(parameter.value)]
    return {f"{module}.{parameter.leaf}": size for module, size in zip(modules, sizes)}


def our_module(theirs: str) -> tuple[str, int]:
    """Our module for a module of LitGPT, and the index of the block that it holds."""
    if found := re.fullmatch(r"(.*\.fc)_([12])", theirs):
        return found[1], int(found[2]) - 1
    return re.sub(r"\.attn\.attn$", ".attn.qkv", theirs), 0


def group_order(config: Config) -> torch.Tensor:
    """For each row of an `attn.attn`, the index of our row."""
    return rows_by_group(config.n_head, config.n_query_groups, config.head_size)


def read_pth(file: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of LitGPT by their names. The file is mapped into memory, and no code in it runs. Raises
    `UserError` if it is truncated, holds something else, or contains code to run."""
    state = read(file)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{file} does not hold named weights.")
    return {str(name).replace("_orig_mod.", ""): t for name, t in state.items()}  # prefix of a compiled model


# what finetuning writes


def lit_adapter_file(folder: Path) -> Optional[Path]:
    """The file of a LitGPT adapter in a folder, if there is one."""
    return next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that wrote a folder, empty if missing. Raises `UserError` if they are unreadable."""
    file = folder / SETTINGS
    return read_yaml(file) if is_there(file) else {}


def read_lora(file: Path, r: int, adapted: list[int], config: Config) -> dict[str, Blocks]:
    """The A and B, of rank r, of each adapted block of our layers. `adapted` has the indices of the adapted ones of q,
    k and v. Raises `UserError` if the model lacks a layer, or a shape does not fit the settings."""
    weights, names = read_pth(file), weight_map(config)
    found: dict[str, Blocks] = defaultdict(dict)
    wrong = []
    for theirs in sorted({re.sub(r"\.lora_[AB]$", "", name) for name in weights}):
        ours, block = our_module(theirs)
        a, b = (weights.get(f"{theirs}.lora_{x}") for x in "AB")
        fused = ours.endswith("attn.qkv")
        sizes = [config.qkv_sizes[i] for i in adapted] if fused else [len(b) if b is not None else 0]
        if a is None or b is None or not names.stored(ours):
            wrong.append(theirs)
        elif len(a) != r * len(sizes) or tuple(b.shape) != (sum(sizes), r):
            wrong.append(f"{theirs} {tuple(a.shape)}, {tuple(b.shape)}")
        else:
            numbers = adapted if fused else [block]
            for i, a_part, b_part in zip(numbers, a.float().split(r), b.float().split(sizes)):
                found[ours][i] = a_part, b_part
    if wrong:
        raise UserError(f"{file} does not match the model and its {SETTINGS}: {'; '.join(wrong)}.")
    return found


def prefix_sources(weights: dict[str, torch.Tensor], path: str, leaf: str, layer: nn.Module) -> list[str]:
    """The names of the tensors in LitGPT's file that hold a trained parameter `leaf` of our module `path`, whose layer
    is given without a wrapper."""
    if path.endswith(".prefix"):
        return [path.removesuffix("prefix") + {"embedding": "adapter_wte.weight", "gate": "gating_factor"}[leaf]]
    modules = lit_modules(without_wrappers(path), layer)
    old = f"{path.removesuffix('qkv')}attn.{leaf}"
    return [old] if path.endswith("attn.qkv") and old in weights else [f"{m}.{leaf}" for m in modules]
