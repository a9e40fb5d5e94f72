"""Where the weights of a run begin: a model folder, or a random draw."""

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
from litgpt.families.weights import Weights, check_weights
from litgpt.litgpt_format.folder import MODEL_CONFIG
from litgpt.methods.adapter_folder import is_adapter
from litgpt.model import GPT
from litgpt.model.config import Config
from litgpt.storage.files import is_there, read_json, read_yaml
from litgpt.text.prompts import STYLE_FILE
from litgpt.text.tokenizer import Tokenizer, copy_files


@dataclass
class BaseModel:
    """The model before the first step.

    Args:
        fields: Its `config.json`.
        config: The same, read.
        tokenizer_folder: Where its tokenizer and its chat template are.
        checkpoint: Its weights; None to draw them.
    """

    fields: dict[str, Any]
    config: Config
    tokenizer_folder: Path
    checkpoint: Optional[Weights] = None

    @classmethod
    def from_folder(cls, path: Path) -> "BaseModel":
        """A model folder, or the name of one under `checkpoints/`. Raises `UserError` if it cannot be used."""
        folder = find_folder(path)
        if is_adapter(folder):
            raise UserError(f"{folder} is an adapter: merge it first (litgpt merge_lora {folder}), then train on that.")
        checkpoint = open_checkpoint(folder)
        return cls(checkpoint.fields, checkpoint.config, folder, checkpoint)

    @classmethod
    def random(cls, fields: dict[str, Any], tokenizer_folder: Path) -> "BaseModel":
        """Random weights for a `config.json`; `vocab_size` is the tokenizer's where it is missing."""
        tokenizer = Tokenizer(tokenizer_folder)
        fields = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, **fields}
        fields = {"eos_token_id": tokenizer.eos_id, **fields}
        config = read_config(fields, name="random")
        if config.padded_vocab_size < tokenizer.vocab_size:
            raise UserError(f"vocab_size {config.padded_vocab_size} is below the tokenizer's {tokenizer.vocab_size}.")
        return cls(fields, config, tokenizer_folder)

    @property
    def name(self) -> str:
        return str(self.checkpoint.folder) if self.checkpoint else "random weights"

    @property
    def base(self) -> str:
        """What an adapter records: the repository id where it is known, else the absolute path."""
        assert self.checkpoint is not None
        return repository_id(self.checkpoint.folder) or str(self.checkpoint.folder.resolve())

    def places(self) -> list[Path]:
        """The folders that the run reads."""
        return [self.tokenizer_folder, *([self.checkpoint.folder] if self.checkpoint else [])]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_folder, n_embeddings=self.config.padded_vocab_size)

    def check(self, model: GPT) -> None:
        """Raise `UserError` if the weights do not fit the model."""
        if self.checkpoint is not None:
            check_weights(model, self.checkpoint)

    def fill(self, model: GPT, dtype: torch.dtype, device: torch.device, shards: Optional[torch.device] = None) -> None:
        """Give a model on the meta device its weights.

        Args:
            shards: Where sharded weights lie, if not on `device`.
        """
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
        """The tokenizer's files, and how the model was prompted in training if that was here."""
        copy_files(self.tokenizer_folder, folder)
        if is_there(self.tokenizer_folder / STYLE_FILE):
            shutil.copyfile(self.tokenizer_folder / STYLE_FILE, folder / STYLE_FILE)


def model_fields(model: Optional[Path], config: Optional[Any]) -> dict[str, Any]:
    """A `config.json` from a model's folder, a YAML or JSON file, or fields given as they are; the latter win.

    Raises:
        UserError: none is given, or one cannot be read.
    """
    fields: dict[str, Any] = {}
    if model is not None:
        folder = find_folder(model, weights=False)
        of_litgpt = is_there(folder / MODEL_CONFIG) and not is_there(folder / "config.json")
        written = write_config(Config.from_file(folder / MODEL_CONFIG)) if of_litgpt else None
        fields |= written or read_json(folder / "config.json")
    if isinstance(config, (str, Path)):
        path = Path(config)
        config = read_json(path) if path.suffix == ".json" else read_yaml(path)
    if config is not None and not isinstance(config, dict):
        raise UserError("--model_config holds no fields of a config.json.")
    fields |= config or {}
    if not fields:
        raise UserError("What model? Give a model folder, --model_config or --initial_checkpoint_dir.")
    return fields
