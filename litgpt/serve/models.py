"""The models that a server offers: a base or an adapter, and further adapters over the same base."""

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
    """Everything that can be asked for.

    Args:
        models: By the name that a request gives; the first is the default. They share one `GPT`.
        adapters: What the engine needs to know of those over the base.
        other_names: For each model what else a request may call it.
    """

    models: dict[str, InferenceModel]
    adapters: Optional[Adapters] = None
    other_names: dict[str, set[str]] = field(default_factory=dict)

    def find(self, name: str) -> Optional[str]:
        """The model that a request means: by its own name, else by another one, else without regard to case. None where
        there is no such model, or more than one."""
        if name in self.models:
            return name
        given = PurePath(name).as_posix()  # as the other names are written
        names = {model: {model, *self.other_names.get(model, ())} for model in self.models}
        exact = [model for model, own in names.items() if given in own]
        found = exact or [m for m, own in names.items() if given.lower() in {n.lower() for n in own}]
        return found[0] if name and len(found) == 1 else None

    def adapter(self, name: str) -> Optional[str]:
        """The adapter that a text of this model names to the engine."""
        return None if name == self.default else name

    @property
    def default(self) -> str:
        return next(iter(self.models))

    @classmethod
    def open(cls, folder: Path, adapters: Mapping[str, Path], **options: Any) -> "ModelRegistry":
        """Load everything. `options` are those of `Loaded.open`.

        Raises:
            UserError: a folder cannot be used, or two models would have one name.
        """
        source = ModelSource.open(folder, options.get("base"))
        name = source.folder.resolve().name.encode(errors="replace").decode()  # bytes that are not UTF-8
        if adapters:
            for given in adapters:
                if not given or any("\ud800" <= c <= "\udfff" for c in given):
                    raise UserError(f"--adapters {given!r}: a request cannot give this name; choose another.")
            if name in adapters:
                raise UserError(f"--adapters {name}: the base has this name; choose another.")
            if source.adapter is not None:
                raise UserError(f"--adapters wants a base model beside it; {folder} is an adapter. List it, too.")
        first = InferenceModel.open(folder, **options)
        others = {name: other_names(folder, first.source)}
        if not adapters:
            return cls({name: first.prepare()}, other_names=others)
        sources = {key: ModelSource.open(path, first.source.folder) for key, path in adapters.items()}
        found: dict[str, AdapterFolder] = {key: source.adapter for key, source in sources.items() if source.adapter}
        for key, adapter in found.items():
            recorded = Path(adapter.base).name
            if recorded and recorded != first.source.folder.resolve().name:
                print(f"litgpt: the adapter {key} says that its base is {adapter.base}.", file=sys.stderr)
        together = add_adapters(first.model, found)
        models = {
            key: replace(first, source=source, tokenizer=source.tokenizer(), style=source.style())
            for key, source in sources.items()
        }
        others |= {key: other_names(path, sources[key]) for key, path in adapters.items()}
        return cls({name: first.prepare(), **models}, together, others)


def other_names(typed: Path, source: ModelSource) -> set[str]:
    """What a model may be called beside the name that it is served under: as on the command line, as on the hub, and by
    its folder."""
    names = (typed.as_posix(), repository_id(source.folder), source.folder.resolve().name)
    return {name for name in names if name}
