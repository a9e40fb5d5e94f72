"""The models of a server: a base model or an adapter, and more adapters on the same base."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Optional

from litgpt.checkpoint.hub import repository_id
from litgpt.errors import UserError
from litgpt.generate.adapters import Adapters, add_adapters
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.adapter_folder import AdapterFolder
from litgpt.methods.model_source import ModelSource


@dataclass
class ModelRegistry:
    """The models of a server, by the name that requests use. The first one is the default. They share one `GPT`."""

    models: dict[str, InferenceModel]
    adapters: Optional[Adapters] = None  # on the base, for the engine
    aliases: dict[str, set[str]] = field(default_factory=dict)  # other names that requests may use for a model

    def find(self, name: str) -> Optional[str]:
        """The name of the model that a request means: by name, else by alias, else ignoring case. None if no model
        matches, or several do."""
        if name in self.models:
            return name
        normalized = PurePath(name).as_posix()
        names = {model: {model, *self.aliases.get(model, ())} for model in self.models}
        exact = [model for model, own in names.items() if normalized in own]
        found = exact or [m for m, own in names.items() if normalized.lower() in {n.lower() for n in own}]
        return found[0] if name and len(found) == 1 else None

    def adapter(self, name: str) -> Optional[str]:
        """The engine's adapter for a model."""
        return None if name == self.default else name

    @property
    def default(self) -> str:
        return next(iter(self.models))

    @classmethod
    def open(cls, folder: Path, adapters: Mapping[str, Path], **options: Any) -> "ModelRegistry":
        """Load a folder and adapters. `options` are those of `InferenceModel.open`. Raises `UserError` if a folder
        cannot be used, or two models would have the same name."""
        source = ModelSource.open(folder, options.get("base"))
        name = source.folder.resolve().name.encode(errors="replace").decode()  # it may not be UTF-8
        if adapters:
            for adapter_name in adapters:
                if not adapter_name or any("\ud800" <= c <= "\udfff" for c in adapter_name):
                    raise UserError(f"--adapters {adapter_name!r}: requests cannot use this name; choose another.")
            if name in adapters:
                raise UserError(f"--adapters {name}: the base model has this name; choose another.")
            if source.adapter is not None:
                raise UserError(f"{folder} is an adapter. With --adapters, pass the base model and list all adapters.")
        first = InferenceModel.open(folder, **options)
        aliases = {name: aliases_of(folder, first.source)}
        if not adapters:
            return cls({name: first.prepare()}, aliases=aliases)
        sources = {key: ModelSource.open(path, first.source.folder) for key, path in adapters.items()}
        found: dict[str, AdapterFolder] = {key: source.adapter for key, source in sources.items() if source.adapter}
        for key, adapter in found.items():
            recorded = Path(adapter.base).name
            if recorded and recorded != first.source.folder.resolve().name:
                print(f"litgpt: the adapter {key} was made for the base {adapter.base}.", file=sys.stderr)
        engine_adapters = add_adapters(first.model, found)
        kwargs = options.get("template_kwargs")
        models = {}
        for key, source in sources.items():
            style = source.style().with_variables(kwargs) if kwargs else source.style()
            models[key] = replace(first, source=source, tokenizer=source.tokenizer(), style=style)
        aliases |= {key: aliases_of(path, sources[key]) for key, path in adapters.items()}
        return cls({name: first.prepare(), **models}, engine_adapters, aliases)


def aliases_of(typed: Path, source: ModelSource) -> set[str]:
    """Other names of a model: as on the command line, as on the hub, and its folder."""
    names = (typed.as_posix(), repository_id(source.folder), source.folder.resolve().name)
    return {name for name in names if name}
