"""The models of a server: a base model or a result, more adapters on the same base, and the base beside them."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Optional

import torch

from litgpt.checkpoint.hub import display_name, repository_id
from litgpt.errors import UserError
from litgpt.generate.adapters import Adapters, add_adapters, misfit
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.model_source import ModelSource
from litgpt.model.gpt import GPT


@dataclass
class ModelRegistry:
    """The models of a server, by the name that requests use. The first one is the default. They share one `GPT`."""

    models: dict[str, InferenceModel]
    adapters: Optional[Adapters] = None  # on the base, for the engine
    base: Optional[str] = None  # the name of the model that has none of them
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
        return None if self.adapters is None or name == self.base else name

    @property
    def default(self) -> str:
        return next(iter(self.models))

    @classmethod
    def open(
        cls, folder: Path, adapters: Mapping[str, Path], name: Optional[str] = None, **options: Any
    ) -> "ModelRegistry":
        """Load a folder and adapters. `options` are those of `InferenceModel.open`.

        Args:
            name: The name of the folder's model, by default its `display_name`.

        Raises:
            UserError: a folder cannot be used, or two models would have the same name.
        """
        source = ModelSource.open(folder, options.pop("base", None))
        own = display_name(source.folder) if name is None else name
        check_names(own, adapters, by_option=name is not None)
        alone = why_alone(source)
        if alone and adapters:
            raise UserError(f"{folder} cannot share its base with --adapters: {alone}.")
        if alone:
            print(f"litgpt: {own} is served without its base: {alone}.", file=sys.stderr)
        paths = {own: folder, **adapters}
        if alone or (source.adapter is None and not adapters):
            model = InferenceModel.open(source, **options).prepare()
            return cls({own: model}, aliases={own: aliases_of(folder, source)})
        base = source if source.adapter is None else source.base()
        sources = {own: source, **{key: ModelSource.open(path, base.folder) for key, path in adapters.items()}}
        base_name = own
        if source.adapter is not None:
            base_name = free_name(display_name(base.folder), sources)
            sources[base_name], paths[base_name] = base, base.folder
        for key in adapters:
            warn_of_other_base(key, sources[key], base)
        kwargs = options.pop("template_kwargs", None)
        first = InferenceModel.open(base, **options)
        found = {key: source.adapter for key, source in sources.items() if source.adapter is not None}
        engine_adapters = add_adapters(first.model, found)
        first.prepare()
        models = {}
        for key, source in sources.items():
            style = source.style().with_variables(kwargs, strict=key == own) if kwargs else source.style()
            models[key] = replace(first, source=source, tokenizer=source.tokenizer(), style=style)
        return cls(models, engine_adapters, base_name, {key: aliases_of(paths[key], s) for key, s in sources.items()})


def check_names(own: str, adapters: Collection[str], by_option: bool) -> None:
    """Raise `UserError` for names that requests cannot use, and for one name of two models."""
    for option, name in [*([("--name", own)] if by_option else []), *(("--adapters", key) for key in adapters)]:
        if not name.strip() or not name.isprintable():
            raise UserError(f"{option} {name!r}: requests cannot use this name; choose another.")
    if own in adapters:
        raise UserError(f"--adapters {own}: the first model has this name; choose another.")


def why_alone(source: ModelSource) -> str:
    """Why an adapter cannot be served together with its base; empty if it can, and for a model without an adapter."""
    if source.adapter is None:
        return ""
    with torch.device("meta"):
        empty = GPT(source.checkpoint.config)
    try:
        base = source.base()
        base.tokenizer(), base.style()
    except UserError as e:
        return str(e).removesuffix(".")
    return misfit(empty, source.adapter)


def warn_of_other_base(name: str, source: ModelSource, base: ModelSource) -> None:
    recorded = Path(source.adapter.base).name if source.adapter is not None else ""
    if recorded and recorded != base.folder.resolve().name:
        print(f"litgpt: the adapter {name} was made for the base {source.adapter.base}.", file=sys.stderr)  # type: ignore[union-attr]


def free_name(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "-base"
    return name


def aliases_of(typed: Path, source: ModelSource) -> set[str]:
    """Other names of a model: as on the command line, as on the hub, by its run, and by its folder."""
    folder = source.folder
    names = (typed.as_posix(), repository_id(folder), display_name(folder), folder.resolve().name)
    return {name for name in names if name}
