"""Opens the folder of a base model or of an adapter as a model that is ready to run."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Optional

import torch

from litgpt.checkpoint.find import find_folder, local_folder
from litgpt.checkpoint.folder import Overlaid, fill_weights, load_weights, open_checkpoint
from litgpt.checkpoint.hub import repository_id
from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.families.weights import Weights
from litgpt.litgpt_format.folder import ADAPTERS, SETTINGS, lit_adapter_file
from litgpt.methods.adapter import AdapterV2Linear
from litgpt.methods.adapter_folder import AdapterFolder, is_adapter, open_adapter
from litgpt.methods.lora import LoRALinear
from litgpt.methods.peft_folder import PICKLED, WEIGHTS, LoRAFolder
from litgpt.methods.quantize import quantize
from litgpt.model.attention import CausalSelfAttention
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.storage.files import is_there, read_yaml
from litgpt.text.prompts import STYLE_FILE, PromptStyle, checkpoint_template, load_style
from litgpt.text.tokenizer import Tokenizer


@dataclass
class ModelSource:
    """A base model with an optional adapter. No weights are read yet."""

    folder: Path  # that was opened; its tokenizer and prompt style take precedence over those of the base
    checkpoint: Weights  # the base model
    adapter: Optional[AdapterFolder]
    tokenizer_dir: Optional[Path] = None  # instead of the tokenizer in the folder
    replaced: list[str] = field(default_factory=list, init=False)  # weights that the adapter changes, such as norms

    @classmethod
    def open(cls, path: Path, base: Optional[Path] = None, merged: bool = True) -> "ModelSource":
        """Open a base folder, an adapter folder or an adapter file. Raises `UserError` if the path is none of these, or
        the recorded base model does not exist.

        Args:
            path: The folder, the name of a model under `checkpoints/`, or the path of an adapter's file.
            base: The base model of an adapter, instead of the recorded one.
            merged: Whether to prefer the merged model that LitGPT writes next to its LoRA.
        """
        is_file = path.name in (WEIGHTS, PICKLED, *ADAPTERS) and path.is_file()
        folder = path.parent if is_file else find_folder(path)
        is_lit_lora = lit_adapter_file(folder) and (base is not None or is_file or not merged)
        if not is_adapter(folder) and not is_lit_lora:
            if base is not None:
                raise UserError(f"{folder} is not an adapter folder, so --base {base} has no effect. Remove the flag.")
            return cls(folder, open_checkpoint(folder), None)
        adapter = open_adapter(folder)
        base_folder = find_base(adapter, "Pass it with --base DIR.") if base is None else find_folder(base)
        return cls(folder, open_checkpoint(base_folder), adapter)

    def base(self) -> "ModelSource":
        """The base model alone, as a source of its own."""
        return ModelSource(self.checkpoint.folder, self.checkpoint, None)

    def weights(self) -> Weights:
        """The base weights, with those replaced that a LoRA folder changes."""
        return self.adapter.over(self.checkpoint) if isinstance(self.adapter, LoRAFolder) else self.checkpoint

    @cached_property
    def config(self) -> Config:
        """Config of the model with its adapter, which may change the number of embeddings."""
        return self.weights().config

    @property
    def tokenizer_folder(self) -> Path:
        """The folder itself, or that of the base if the adapter has no tokenizer, as when `peft` wrote it."""
        return self.tokenizer_dir or tokenizer_folder(self.folder, self.checkpoint.folder)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.tokenizer_folder, self.checkpoint.folder, self.config.padded_vocab_size)

    def style(self) -> PromptStyle:
        return load_style(style_folder(self.folder, self.tokenizer_folder))

    def model(self, dtype: torch.dtype, device: torch.device, scheme: Optional[str] = None) -> GPT:
        """The model with its adapter, in evaluation mode, without gradients. `scheme` is a `QuantizeName`, or None."""
        weights = self.weights()
        with torch.device("meta"):
            model = GPT(weights.config)
        if scheme is not None:
            quantize(model, scheme, device)
        if self.adapter is not None:
            self.adapter.apply(model)
        load_weights(model, weights, dtype, device)
        if self.adapter is not None:
            parameters = weight_map(model.config).parameters(model)
            before = {name: parameter.value._version for name, parameter in parameters.items()}
            self.adapter.load_into(model)  # the version of a tensor grows when it is written to
            self.replaced = [name for name, p in parameters.items() if p.value._version != before[name]]
        if isinstance(weights, Overlaid):
            self.replaced += map(weight_map(weights.config).find_parameter, weights.replaced)
        return model.requires_grad_(False).eval()

    def check_base(self) -> None:
        """Raise `UserError` if the adapter cannot be removed from the model."""
        if self.config.padded_vocab_size != self.checkpoint.config.padded_vocab_size:
            raise UserError(
                f"The adapter in {self.folder} changes the number of embeddings, so it cannot be turned off. Use "
                f"{self.checkpoint.folder} instead."
            )

    @contextmanager
    def without_adapter(self, model: GPT) -> Iterator[None]:
        """Remove the adapter from a model within the context. Weights that the adapter replaced are read again, so
        there is no second base in memory. Raises as `check_base`."""
        self.check_base()
        wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, (LoRALinear, AdapterV2Linear))]
        attentions = [m for m in model.modules() if isinstance(m, CausalSelfAttention)]
        prefixes = [attention.prefix for attention in attentions]
        for name, wrapper in wrappers:
            model.set_submodule(name, wrapper.linear)
        for attention in attentions:
            attention.prefix = None
        parameters = weight_map(model.config).parameters(model)
        changed = {name: p for name, p in parameters.items() if name in self.replaced}
        learned = {name: parameter.value.clone() for name, parameter in changed.items()}
        base, names = self.checkpoint, weight_map(self.checkpoint.config)
        if base.config.tie_embeddings and not model.config.tie_embeddings:
            base = Overlaid(base, {names.head: base.tensor(names.embedding)}, model.config)
        fill_weights(model, base, changed)
        try:
            yield
        finally:
            for name, parameter in changed.items():
                parameter.value.copy_(learned[name])
            for name, wrapper in wrappers:
                model.set_submodule(name, wrapper)
            for attention, prefix in zip(attentions, prefixes):
                attention.prefix = prefix


def find_base(adapter: AdapterFolder, remedy: str, weights: bool = True) -> Path:
    """The folder of the base that an adapter records. Raises `UserError`, which ends with `remedy`, if there is none.
    `weights` as for `find_folder`."""
    if not adapter.base:
        raise UserError(f"{adapter.folder} does not name its base model. {remedy}")
    try:
        return recorded_folder(adapter) or find_folder(Path(adapter.base), weights)
    except (UserError, OSError) as e:
        raise UserError(f"The base model of {adapter.folder} is not at {adapter.base[:200]!r}. {remedy} ({e})") from e


def recorded_folder(adapter: AdapterFolder) -> Optional[Path]:
    """The folder that the run read the base from, if the adapter names the base by its hub ID, and there is none of
    that name under the `checkpoints` of the current folder."""
    settings = adapter.folder / SETTINGS
    if not is_there(settings) or local_folder(Path(adapter.base)) is not None:
        return None
    with suppress(UserError):  # settings that are not readable do not matter here
        typed = read_yaml(settings).get("checkpoint_dir")
        found = local_folder(Path(typed)) if typed else None
        return found if found is not None and repository_id(found) == adapter.base else None
    return None


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """The folder of the tokenizer: that of the adapter, or of the base if `peft` wrote the adapter without one."""
    own = any(is_there(adapter / name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return adapter if own else base


def style_folder(adapter: Path, other: Path) -> Path:
    """The folder of the prompt style: that of the adapter if it has one."""
    own = is_there(adapter / STYLE_FILE) or checkpoint_template(adapter) is not None
    return adapter if own else other
