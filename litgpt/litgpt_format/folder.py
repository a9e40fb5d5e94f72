"""LitGPT's folders: `lit_model.pth` has the weights, `model_config.yaml` describes the model.

Its weights have our names with two exceptions. Gate and up are two layers there, `fc_1` and `fc_2`. In older files q, k
and v are one tensor, `attn.attn`, that holds for each key-value head its queries, its key and its value.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.errors import UserError
from litgpt.families import check, read_config, weight_map, write_config
from litgpt.families.table import Stored, rows_by_group
from litgpt.families.weights import KINDS, READ, Weights, check_count, check_tied, check_weights
from litgpt.model import GPT
from litgpt.model.config import Config, differences
from litgpt.storage.files import is_there, read_json
from litgpt.storage.torch_file import read
from litgpt.text.tokenizer import Tokenizer

MODEL, MODEL_CONFIG = "lit_model.pth", "model_config.yaml"
ADAPTERS = (f"{MODEL}.lora", f"{MODEL}.adapter", f"{MODEL}.adapter_v2")
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in safetensors


@dataclass
class StoredRows:
    """Where LitGPT's file has the rows of a Hugging Face tensor.

    Args:
        names: The tensors that, concatenated, have them.
        order: For each row in the file, the index of our row; None if the order is the same.
        rows: The rows of ours that the Hugging Face tensor holds.
        form: How it holds them.
    """

    names: list[str]
    order: Optional[torch.Tensor]
    rows: slice
    form: Stored


class LitCheckpoint(Weights):
    """`Weights` in LitGPT's form, under their Hugging Face names.

    `model_config.yaml` describes the model. A `config.json` beside it is used if it describes the same one.

    Raises:
        UserError: something is missing, truncated, does not fit, or contains code to run.
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
        if fields.get("model_type") == "gemma3":  # its vision part is missing
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
        """The `config.json` to write with the model as a Hugging Face folder.

        Raises:
            UserError: no `config.json` can describe it.
        """
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
        for name, module, leaf, _ in (parameters := names.parameters(model)).values():
            ours, shape = name.rpartition(".")[0], tuple(getattr(module, leaf).shape)
            theirs, order = [f"{n}.{leaf}" for n in lit_modules(ours, module)], None
            old = f"{ours.removesuffix('qkv')}attn.{leaf}"
            if ours.endswith("attn.qkv") and old in self.weights:
                theirs, order = [old], group_order(self.config)
            sizes = module.parts if len(theirs) > 1 else shape[:1]  # type: ignore[union-attr]
            expected |= {n: (size, *shape[1:]) for n, size in zip(theirs, sizes)}  # type: ignore[arg-type]
            tensors = parameters[name].tensors
            if tensors[0].name == names.tied_head:
                continue
            dtype = self.weights[theirs[0]].dtype if theirs[0] in self.weights else torch.float32
            for i, (hf, form, rows) in enumerate(tensors):
                alone = StoredRows([theirs[i]], order, slice(None), form) if len(tensors) == len(theirs) else None
                self.sources[hf] = alone or StoredRows(theirs, order, rows, form)
                self.shapes[hf] = parameters[name].shape(tensors[i])
                self.files[hf] = self.file
                self.dtypes[hf] = NAMES.get(dtype, str(dtype).removeprefix("torch."))
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
    """The weights of a model under LitGPT's names, in its form; a tied head is the embedding's tensor again.

    Raises:
        UserError: the weights do not fit the model.
    """
    names = weight_map(checkpoint.config)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    check_weights(model, checkpoint)
    check_tied(checkpoint, names)
    embedding = torch.empty(0)
    parameters = names.parameters(model).values()
    for parameter in sorted(parameters, key=lambda p: p.name != "transformer.wte.weight"):
        tensors, leaf = parameter.tensors, parameter.leaf
        if tensors[0].name == names.tied_head:
            yield parameter.name, embedding
            continue
        parts = [tensor.form.to_ours(checkpoint.tensor(tensor.name)) for tensor in tensors]
        theirs = lit_modules(parameter.name.rpartition(".")[0], parameter.module)
        if len(parts) != len(theirs):
            joined = torch.cat(parts)
            sizes = parameter.module.parts if len(theirs) > 1 else [len(joined)]  # type: ignore[union-attr]
            parts = list(joined.split(list(sizes)))  # type: ignore[arg-type]
        if parameter.name == "transformer.wte.weight":
            embedding = parts[0]
        for module, part in zip(theirs, parts):
            yield f"{module}.{leaf}", part.clone() if len(parts) > 1 else part.contiguous()


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


def our_module(theirs: str) -> tuple[str, int]:
    """Our module for a module of LitGPT, and the index of the block that it holds."""
    if found := re.fullmatch(r"(.*\.fc)_([12])", theirs):
        return found[1], int(found[2]) - 1
    return re.sub(r"\.attn\.attn$", ".attn.qkv", theirs), 0


def group_order(config: Config) -> torch.Tensor:
    """For each row of an `attn.attn`, the index of our row."""
    return rows_by_group(config.n_head, config.n_query_groups, config.head_size)


def read_pth(file: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of LitGPT by their names. The file is mapped into memory, and no code in it runs.

    Raises:
        UserError: it is truncated, holds something else, or contains code to run.
    """
    state = read(file)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{file} does not hold named weights.")
    return {str(name).replace("_orig_mod.", ""): t for name, t in state.items()}  # prefix of a compiled model
