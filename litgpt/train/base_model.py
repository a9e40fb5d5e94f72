"""The model that a run starts from: a model folder, or random weights."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import load_weights, open_checkpoint
from litgpt.checkpoint.hub import repository_id
from litgpt.errors import UserError
from litgpt.families import read_config, write_config
from litgpt.families.weights import KINDS, EmptyWeights, Weights
from litgpt.litgpt_format.folder import MODEL, MODEL_CONFIG
from litgpt.methods.adapter_folder import is_adapter
from litgpt.model.config import Config, from_litgpt
from litgpt.model.gpt import GPT
from litgpt.storage.files import is_there, read_json, read_yaml
from litgpt.text.prompts import STYLE_FILE
from litgpt.text.tokenizer import Tokenizer, copy_files
from litgpt.train.args import planning


@dataclass
class BaseModel:
    """The model before the first step."""

    fields: dict[str, Any]  # the contents of `config.json`
    config: Config  # made from them
    tokenizer_folder: Path  # with its tokenizer and chat template
    checkpoint: Optional[Weights] = None  # its weights; None for random ones

    @classmethod
    def from_folder(cls, path: Path, planned: bool = False) -> "BaseModel":
        """A model folder, or the name of one under `checkpoints/`. A run that is only `planned` needs no weights.

        Raises `UserError` if the folder is not usable."""
        planned = planned or planning.get() is not None
        folder = find_folder(Path(path), weights=not planned)
        if is_adapter(folder):
            raise UserError(f"{folder} is an adapter. Merge it first: litgpt merge_lora {folder}.")
        if planned and not has_weights(folder):
            return cls.without_weights(folder)
        checkpoint = open_checkpoint(folder)
        return cls(checkpoint.fields, checkpoint.config, folder, checkpoint)

    @classmethod
    def without_weights(cls, folder: Path) -> "BaseModel":
        """A folder with `config.json` and the tokenizer alone, for a plan."""
        fields = read_json(folder / "config.json")
        config = read_config(fields, name=folder.name)
        with torch.device("meta"):
            checkpoint = EmptyWeights(GPT(config), fields, folder, {})
        return cls(fields, config, folder, checkpoint)

    @classmethod
    def random(cls, fields: dict[str, Any], tokenizer_folder: Path) -> "BaseModel":
        """Random weights for the fields of a `config.json`, which default to those of the tokenizer."""
        tokenizer = Tokenizer(tokenizer_folder)
        defaults = {"eos_token_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
        fields = defaults | {"bos_token_id": tokenizer.bos_id} | fields
        config = read_config(fields, name="random")
        if config.padded_vocab_size < tokenizer.vocab_size:
            raise UserError(f"vocab_size {config.padded_vocab_size} is below the tokenizer's {tokenizer.vocab_size}.")
        return cls(fields, config, tokenizer_folder)

    @property
    def name(self) -> str:
        return str(self.checkpoint.folder) if self.checkpoint else "random weights"

    @property
    def base(self) -> str:
        """The base that an adapter records: the repository ID if known, else the absolute path."""
        assert self.checkpoint is not None
        return repository_id(self.checkpoint.folder) or str(self.checkpoint.folder.resolve())

    def places(self) -> list[Path]:
        """The folders that a run reads."""
        return [self.tokenizer_folder, *([self.checkpoint.folder] if self.checkpoint else [])]

    def check_tied(self, tied: Optional[bool]) -> None:
        if tied not in (None, self.config.tie_embeddings):
            raise UserError(
                f"--train.tie_embeddings {tied} does not match the checkpoint, which has {self.config.tie_embeddings}."
            )

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_folder, n_embeddings=self.config.padded_vocab_size)

    def fill(self, model: GPT, dtype: torch.dtype, device: torch.device, shards: Optional[torch.device] = None) -> None:
        """Load or initialize the weights of a model on the meta device. `shards` is the device of sharded weights, if
        not `device`."""
        if self.checkpoint is not None:
            load_weights(model, self.checkpoint, dtype, device, shards)
        else:
            trained = {name: p.requires_grad for name, p in model.named_parameters()}
            model.to_empty(device=shards or device).to(dtype)
            model.tie_weights()
            model.reset_parameters()
            for name, p in model.named_parameters():
                p.requires_grad_(trained[name])

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer, and the prompt style that the model was trained with, if known."""
        copy_files(self.tokenizer_folder, folder)
        if is_there(self.tokenizer_folder / STYLE_FILE):
            shutil.copyfile(self.tokenizer_folder / STYLE_FILE, folder / STYLE_FILE)


def has_weights(folder: Path) -> bool:
    names = [MODEL, *KINDS, *(f"{kind}.index.json" for kind in KINDS)]
    return any(is_there(folder / name) for name in names)


def model_fields(model: Optional[Path], config: Optional[Any]) -> dict[str, Any]:
    """The fields of a `config.json`: those of the folder `model`, overridden by `config`, which is a YAML or JSON file
    with fields, or the fields. LitGPT's fields are translated. Raises `UserError` if neither is given or one is not
    readable."""
    fields: dict[str, Any] = {}
    if model is not None:
        folder = find_folder(model, weights=False)
        if is_there(folder / MODEL_CONFIG) and not is_there(folder / "config.json"):
            fields |= write_config(Config.from_file(folder / MODEL_CONFIG))
        else:
            fields |= read_json(folder / "config.json")
    if isinstance(config, (str, Path)):
        path = Path(config)
        config = read_json(path) if path.suffix == ".json" else read_yaml(path)
    if config is not None and not isinstance(config, dict):
        raise UserError("--model_config must be a mapping with fields of a config.json.")
    if config and "n_layer" in config and "model_type" not in config:
        config = write_config(from_litgpt(config))
    fields |= config or {}
    if not fields:
        raise UserError("Missing model. Pass a model folder, --model_config, or --initial_checkpoint_dir.")
    return fields
