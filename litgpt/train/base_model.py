"""The model that a run starts from: a model folder, or random weights."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import load_weights, open_checkpoint
from litgpt.checkpoint.hub import PICO, repository_id
from litgpt.errors import UserError
from litgpt.families import read_config, write_config
from litgpt.families.weights import KINDS, EmptyWeights, Weights, check_weights
from litgpt.litgpt_format.folder import MODEL, MODEL_CONFIG, lit_adapter_file
from litgpt.methods.adapter_folder import AdapterFolder, is_adapter, open_adapter
from litgpt.methods.merged import MergedWeights
from litgpt.methods.model_source import find_base, style_folder, tokenizer_folder
from litgpt.methods.peft_folder import LoRAFolder
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
    adapter: Optional[AdapterFolder] = None  # the initial values of the weights that the method adds

    @classmethod
    def from_folder(cls, path: Path, initial_adapter: Optional[Path] = None, planned: bool = False) -> "BaseModel":
        """A model folder, or the name of one under `checkpoints/`, or an adapter folder, which names its base.
        `initial_adapter` is the folder of an adapter if `path` is its base. A run that is only `planned` needs no
        weights. Raises `UserError` if a folder is not usable."""
        weights = not planned and planning.get() is None
        folder, adapter = find_folder(Path(path), weights), None
        if initial_adapter is not None:
            own = find_folder(initial_adapter)
            if is_adapter(folder):
                raise UserError(f"--initial_adapter {own} needs a base as the model, and {folder} is an adapter too.")
            if not is_adapter(own) and not lit_adapter_file(own):
                raise UserError(f"--initial_adapter {own} is not an adapter folder.")
            adapter = open_adapter(own)
        elif is_adapter(folder):
            adapter = open_adapter(folder)
            folder = find_base(adapter, f"Pass the base as the model, and --initial_adapter {folder}.", weights)
        if not weights and not has_weights(folder):
            base_model = cls.without_weights(folder)
        else:
            checkpoint = open_checkpoint(folder)
            base_model = cls(checkpoint.fields, checkpoint.config, folder, checkpoint)
        return base_model if adapter is None else base_model.with_adapter(adapter)

    def with_adapter(self, adapter: AdapterFolder) -> "BaseModel":
        """The model with those weights replaced that an adapter has in full, and with the adapter's tokenizer."""
        assert self.checkpoint is not None
        weights = adapter.over(self.checkpoint) if isinstance(adapter, LoRAFolder) else self.checkpoint
        folder = tokenizer_folder(adapter.folder, self.tokenizer_folder)
        return BaseModel(weights.fields, weights.config, folder, weights, adapter)

    def merged(self) -> "BaseModel":
        """The model with the updates of its adapter, if it has one, added to its weights. Raises `UserError` if that is
        not possible."""
        if self.adapter is None:
            return self
        if not isinstance(self.adapter, LoRAFolder):
            raise UserError(
                f"{self.adapter.folder} is a {self.adapter.description}, which cannot be merged into its base. Pass a "
                "model folder."
            )
        assert self.checkpoint is not None
        weights = MergedWeights(self.checkpoint, self.adapter)
        return replace(self, fields=weights.fields, config=weights.config, checkpoint=weights, adapter=None)

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
        if {"text_config", "vision_config"} & fields.keys():  # there are no weights for the other parts
            fields = {k: fields[k] for k in ("bos_token_id", "eos_token_id")} | write_config(config)
            config = read_config(fields, name="random")
        if config.padded_vocab_size < tokenizer.vocab_size:
            raise UserError(f"vocab_size {config.padded_vocab_size} is below the tokenizer's {tokenizer.vocab_size}.")
        return cls(fields, config, tokenizer_folder)

    @property
    def name(self) -> str:
        if self.checkpoint is None:
            return "random weights"
        return PICO.name if self.checkpoint.folder == PICO else str(self.checkpoint.folder)

    @property
    def initial_adapter(self) -> Optional[AdapterFolder]:
        """The adapter that training starts from, also if it is merged."""
        return self.checkpoint.adapter if isinstance(self.checkpoint, MergedWeights) else self.adapter

    @property
    def style_folder(self) -> Path:
        """The folder with the prompt style that the model was trained with, if known."""
        adapter = self.initial_adapter
        return self.tokenizer_folder if adapter is None else style_folder(adapter.folder, self.tokenizer_folder)

    @property
    def base(self) -> str:
        """The base that an adapter records: the repository ID if known, else the absolute path."""
        assert self.checkpoint is not None
        return repository_id(self.checkpoint.folder) or str(self.checkpoint.folder.resolve())

    def places(self) -> list[Path]:
        """The folders that a run reads."""
        adapter = self.initial_adapter
        folders = [self.checkpoint.folder] if self.checkpoint else []
        return [self.tokenizer_folder, *folders, *([adapter.folder] if adapter else [])]

    def check_model(self, model: GPT) -> None:
        """Raise `UserError` if the weights do not fit the model as a method changed it."""
        if self.checkpoint is not None:
            check_weights(model, self.checkpoint)
        if self.adapter is not None:
            self.adapter.check_trainable(model)

    def check_tied(self, tied: Optional[bool]) -> None:
        if tied not in (None, self.config.tie_embeddings):
            raise UserError(
                f"--train.tie_embeddings {tied} does not match the checkpoint, which has {self.config.tie_embeddings}."
            )

    def tokenizer(self) -> Tokenizer:
        model_folder = self.checkpoint.folder if self.checkpoint else None
        return Tokenizer(self.tokenizer_folder, model_folder, self.config.padded_vocab_size)

    def fill(self, model: GPT, dtype: torch.dtype, device: torch.device, shards: Optional[torch.device] = None) -> None:
        """Load or initialize the weights of a model on the meta device. `shards` is the device of sharded weights, if
        not `device`."""
        if self.checkpoint is not None:
            load_weights(model, self.checkpoint, dtype, device, shards)
            if self.adapter is not None:
                self.adapter.load_into(model)
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
        if is_there(self.style_folder / STYLE_FILE):
            shutil.copyfile(self.style_folder / STYLE_FILE, folder / STYLE_FILE)


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
