"""Groups of options: the fields of a dataclass, written once, become options of every command that takes it."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from textwrap import indent
from types import MappingProxyType
from typing import Any, get_type_hints

from docstring_parser.google import parse


def option_group(
    parameter: str,
    kind: type,
    prefix: str = "",
    defaults: Mapping[str, Any] = MappingProxyType({}),
    skip: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command so that the fields of a dataclass, `kind`, take the place of one of its parameters.

    The decorated function has a parameter for each field, with the field's default, type, and help, and calls the
    original with the dataclass made from them. A caller from Python may also pass the dataclass itself. The help is
    what the dataclass's docstring says under `Args:`, unless the function's own has a description; a field without a
    description, or without `init`, is not an option.

    Args:
        prefix: Put before the names of the fields.
        defaults: Defaults of this command that differ from the dataclass's, by field.
        skip: Fields that are not options of this command.
    """
    help_lines = docs_of_fields(kind)
    hints = get_type_hints(kind)
    fields = [f for f in dataclasses.fields(kind) if f.init and f.name in help_lines and f.name not in skip]
    options = {prefix + f.name: f for f in fields}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        added = [
            inspect.Parameter(name, keyword, default=defaults.get(f.name, f.default), annotation=hints[f.name])
            for name, f in options.items()
        ]
        parameters: list[inspect.Parameter] = []
        for p in signature.parameters.values():
            parameters += added if p.name == parameter else [p]

        @wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            if parameter not in kwargs:
                fields = {f.name: kwargs.pop(name) for name, f in options.items() if name in kwargs}
                kwargs[parameter] = kind(**{**defaults, **fields})
            return function(*args, **kwargs)

        own = docs_of_fields(function)
        about, _, args = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
        lines = "".join(f"    {name}: {help_lines[f.name]}\n" for name, f in options.items() if name not in own)
        heading = (inspect.getdoc(kind) or "").partition(". ")[0].partition("\n")[0].rstrip(".")
        titles = getattr(function, "option_titles", {}) | dict.fromkeys(options, heading)
        command.option_titles = titles  # type: ignore[attr-defined]
        command.__doc__ = indent(f"{about}\n\nArgs:\n{lines}{args}", "    ").lstrip()
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def docs_of_fields(described: Callable[..., Any]) -> dict[str, str]:
    described_params = parse(inspect.getdoc(described) or "").params
    return {p.arg_name: " ".join((p.description or "").split()) for p in described_params if p.args[0] == "param"}
