"""LitGPT's folders: `lit_model.pth`, the weights, and `model_config.yaml`, the model.

Its weights have our names but for two things. Gate and up are two layers there, `fc_1` and `fc_2`. And in older files
q, k and v stand under `attn.attn`, in another order: for each key-value head its queries, its key and its value.
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
from litgpt.families import check, name_table, read_config, write_config
from litgpt.families.table import Stored, rows_by_group
from litgpt.families.weights import (
    KINDS,
    READ,
    Weights,
    base_parameters,
    check_count,
    check_tied,
    check_weights,
    stored_pieces,
    tied_head,
)
from litgpt.model import GPT
from litgpt.model.config import Config, differences
from litgpt.storage.files import is_there, read_json
from litgpt.storage.torch_file import read
from litgpt.text.tokenizer import Tokenizer

MODEL, MODEL_CONFIG = "lit_model.pth", "model_config.yaml"
ADAPTERS = (f"{MODEL}.lora", f"{MODEL}.adapter", f"{MODEL}.adapter_v2")
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}  # in safetensors' words


@dataclass
class StoredRows:
    """Where a Hugging Face tensor is in LitGPT's file.

    Args:
        names: The tensors whose rows, one below the other, are rows of ours.
        order: For each row in the file, which of ours it is; the same order by default.
        rows: Those of ours that the Hugging Face tensor holds.
        stored: How it holds them.
    """

    names: list[str]
    order: Optional[torch.Tensor]
    rows: slice
    stored: Stored


class LitCheckpoint(Weights):
    """`Weights` in LitGPT's form: they go by their Hugging Face names all the same.

    The model is that of `model_config.yaml`, as LitGPT has it. A `config.json` beside it is used if it says the same.

    Raises:
        UserError: something is missing, cut short, does not fit, or wants to run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / MODEL
        if not is_there(folder / MODEL_CONFIG):
            raise UserError(f"{folder} has {MODEL}, but no {MODEL_CONFIG} that says what model it is.")
        config = Config.from_file(folder / MODEL_CONFIG)
        try:
            check(config)
        except UserError as e:
            raise UserError(str(e).replace("config.json", str(folder / MODEL_CONFIG))) from e
        config.name = folder.name
        self.weights, self.read = read_pth(self.file), 0
        try:
            check_count(config, len(self.weights))
        except UserError as e:
            raise UserError(str(e).replace("config.json", str(folder / MODEL_CONFIG))) from e
        config.tie_embeddings = self.is_tied()
        self.without_fields: Optional[UserError] = None
        try:
            self.written = self.own_fields(config) or write_config(config)
            config = read_config(self.written, folder.name)
        except UserError as e:  # it can be run, but not written as a Hugging Face folder
            self.without_fields = e
        self.config = config
        self.shapes, self.dtypes, self.files = {}, {}, {}
        self.pieces: dict[str, StoredRows] = {}
        self.find_pieces()

    def shards(self) -> list[Path]:
        return [self.file]

    def is_tied(self) -> bool:
        """Whether the head is the embedding: LitGPT has both, also where they are the same."""
        head, embedding = self.weights.get("lm_head.weight"), self.weights.get("transformer.wte.weight")
        if head is None or embedding is None or head.shape != embedding.shape or not len(head):
            return False
        return torch.equal(head[0], embedding[0]) and torch.equal(head, embedding)

    def own_fields(self, config: Config) -> dict[str, Any]:
        """The folder's `config.json`, if it has one that says the same."""
        file = self.folder / "config.json"
        if not is_there(file):
            return {}
        fields = read_json(file)
        if fields.get("model_type") == "gemma3":  # whose vision part is not there
            return {}
        try:
            other = differences(config, read_config(fields))
        except UserError as e:
            other = [str(e)]
        if other:
            say(f"{file} does not describe the model of {MODEL_CONFIG} ({', '.join(other)}), and is not used.")
            return {}
        return fields | {"tie_word_embeddings": config.tie_embeddings}

    @cached_property
    def fields(self) -> dict[str, Any]:  # type: ignore[override]
        """What `config.json` is to hold where the model is written as a Hugging Face folder.

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

    def find_pieces(self) -> None:
        """Find what holds each Hugging Face tensor. Raises `UserError` unless names and shapes fit the config."""
        table, wanted = name_table(self.config), dict[str, tuple[int, ...]]()
        with torch.device("meta"):
            model = GPT(self.config)
        for name, (module, leaf) in base_parameters(model).items():
            ours = name.rpartition(".")[0]
            shape = tuple(getattr(module, leaf).shape)
            names, order = [f"{n}.{leaf}" for n in lit_modules(ours, module)], None
            old = f"{ours.removesuffix('qkv')}attn.{leaf}"
            if ours.endswith("attn.qkv") and old in self.weights:
                names, order = [old], group_order(self.config)
            sizes = module.parts if len(names) > 1 else shape[:1]  # type: ignore[union-attr]
            wanted |= {n: (size, *shape[1:]) for n, size in zip(names, sizes)}  # type: ignore[arg-type]
            if ours == "lm_head" and leaf == "weight" and self.config.tie_embeddings:
                continue
            pieces, row = stored_pieces(table, name, module, leaf), 0
            for i, (hf, stored, rows) in enumerate(pieces):
                here = slice(row, row + len(rows))
                own = StoredRows(names, order, here, stored)
                if len(pieces) == len(names):
                    own = StoredRows([names[i]], order, slice(0, len(rows)), stored)
                row += len(rows)
                self.pieces[hf], self.shapes[hf] = own, tuple(stored.shape(rows.shape))
                self.files[hf] = self.file
                dtype = self.weights[names[0]].dtype if names[0] in self.weights else torch.float32
                self.dtypes[hf] = NAMES.get(dtype, str(dtype).removeprefix("torch."))
        found = {n: tuple(t.shape) for n, t in self.weights.items()}
        wrong = [f"{n} is missing" for n in wanted if n not in found]
        wrong += [f"{n} is unknown" for n in found if n not in wanted]
        wrong += [f"{n} {found[n]} instead of {s}" for n, s in wanted.items() if n in found and found[n] != s]
        if wrong:
            raise UserError(f"{self.file} does not fit its {MODEL_CONFIG}: {'; '.join(wrong)}.")

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights with their Hugging Face names, one after the other."""
        for name in names:
            if self.read > READ:
                self.weights, self.read = read_pth(self.file), 0
            place = self.pieces[name]
            parts = [self.weights[n] for n in place.names]
            self.read += sum(t.nbytes for t in parts)
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            whole = whole if place.order is None else whole[place.order.argsort()]
            yield name, place.stored.from_ours(whole[place.rows]).contiguous()


def to_lit(checkpoint: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model by LitGPT's names, as it stores them; a tied head is the embedding's tensor again.

    Raises:
        UserError: the weights do not fit the model.
    """
    config = checkpoint.config
    table, tied = name_table(config), tied_head(config)
    with torch.device("meta"):
        model = GPT(config)
    check_weights(model, checkpoint)
    embedding = torch.empty(0)
    parameters = base_parameters(model)
    for name in sorted(parameters, key=lambda n: n != "transformer.wte.weight"):
        module, leaf = parameters[name]
        ours = name.rpartition(".")[0]
        pieces = stored_pieces(table, name, module, leaf)
        if pieces[0][0] == tied:
            if tied in checkpoint.files:
                check_tied(checkpoint, tied, f"{table.to_hf('transformer.wte')[0]}.weight")
            yield name, embedding
            continue
        parts = [stored.to_ours(checkpoint.tensor(hf)) for hf, stored, _ in pieces]
        names = lit_modules(ours, module)
        if len(parts) != len(names):
            whole = torch.cat(parts)
            sizes = module.parts if len(names) > 1 else [len(whole)]  # type: ignore[union-attr]
            parts = list(whole.split(list(sizes)))  # type: ignore[arg-type]
        if ours == "transformer.wte":
            embedding = parts[0]
        for theirs, part in zip(names, parts):
            yield f"{theirs}.{leaf}", part.clone() if len(parts) > 1 else part.contiguous()


def has_hf_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(
        (folder / f"{kind}{end}").is_file() for kind in KINDS for end in ("", ".index.json")
    )


@cache
def say(message: str) -> None:
    """Once for all."""
    print(f"litgpt: {message}", file=sys.stderr)


def lit_modules(ours: str, module: Any) -> list[str]:
    """LitGPT's modules that hold a module of ours, in the order of its rows."""
    gated = ours.endswith(".fc") and len(getattr(module, "parts", ())) == 2
    return [f"{ours}_1", f"{ours}_2"] if gated else [ours]


def our_module(theirs: str) -> tuple[str, int]:
    """Our module for one of LitGPT's, and which of its blocks that is."""
    if found := re.fullmatch(r"(.*\.fc)_([12])", theirs):
        return found[1], int(found[2]) - 1
    return re.sub(r"\.attn\.attn$", ".attn.qkv", theirs), 0


def group_order(config: Config) -> torch.Tensor:
    """For each row of an `attn.attn`, which of ours it is."""
    assert config.n_query_groups is not None and config.head_size is not None
    return rows_by_group(config.n_head, config.n_query_groups, config.head_size)


def read_pth(file: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of LitGPT's by their names; the file is mapped into memory, and nothing of it is run.

    Raises:
        UserError: it is cut short, holds something else, or wants to run code.
    """
    state = read(file)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{file} does not hold weights by their names.")
    return {str(name).replace("_orig_mod.", ""): t for name, t in state.items()}  # the prefix of a compiled model
