"""The names and types of the options: of a command, and of the classes that `--data` and `--optimizer` name."""

import importlib
import inspect
import re
import types
from argparse import Action
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from litgpt.cli.legacy import NAMES, REFUSED_VALUES
from litgpt.data import MODULES as DATA_SETS
from litgpt.data import inner_classes
from litgpt.errors import UserError, nearest, reason
from litgpt.storage.files import check_events

CLASSES = ("data", "optimizer")  # options whose value is a class, which brings options of its own
UNAVAILABLE = ("LitData", "MicroLlama", "OpenWebText", "TinyLlama")  # LitGPT's data sets that need its own preparation
NO_CLOSURE = ("LBFGS", "SparseAdam")  # optimizers of torch that the training loop cannot drive
REQUIRED = {  # what an option stands for, where its name says too little
    "checkpoint_dir": "the model folder, or ORG/NAME, or pico, which is built in",
    "finetune": "the model and the options of a finetune",
    "shell": "the shell: bash, zsh, or fish",
    "repo_id": "the model as ORG/NAME, or: list",
}
KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    Sequence: "a list",
    dict: "a mapping like {a: b}",
    Path: "a path",
}
SYNONYMS = {  # names that other programs use for options whose values differ from theirs
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "model": "checkpoint_dir",
    "model_name_or_path": "checkpoint_dir",
    "base_model": "checkpoint_dir",
    "dataset": "data",
    "datasets": "data",
    "train_file": "data",
    "rank": "lora_r",
    "target_modules": "lora_targets",
    "fp16": "precision",
    "packing": "train.pack",
    "eval_steps": "eval.interval",
    "save_steps": "train.save_interval",
    "save_total_limit": "train.keep_last",
    "logging_steps": "train.log_interval",
    "resume_from_checkpoint": "resume",
    "report_to": "logger_name",
    "system_prompt": "sys_prompt",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
}


class Parser(ArgumentParser):
    """Raises `UserError` where the library would print its usage."""

    positionals: list[str]  # options that take words without a flag: the first parameter, and required ones after it
    takes_many: bool  # whether the first of them takes a list
    command: str  # its name in the table of commands
    function: Callable[..., None]
    own: list[str]  # the options of the function, without those of `ALSO_TAKES`

    def error(self, message: str, ex: Any = None) -> NoReturn:
        raise UserError(" ".join(str(ex or message).split())) from None


def option_names(parser: ArgumentParser) -> list[str]:
    """The dotted names of a parser's options, without those of the chosen classes."""
    names = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    return [n for n in names if not n.startswith("-") and not n.endswith(".help")]


def option_actions(parser: ArgumentParser) -> dict[str, Action]:
    """The typed options of a parser by their dotted names."""
    actions = (a for a in parser._actions if hasattr(a, "_typehint"))
    return {a.dest: a for a in actions if not a.dest.endswith(".help")}


def current_name(name: str, parser: ArgumentParser) -> str:
    """The dotted name of an option that LitGPT has at the top level or calls otherwise, or that is typed with dashes;
    any other name as it is."""
    known = option_names(parser)
    plain = name.replace("-", "_")
    if name in known or plain in known or "." in name:
        return plain if plain in known else name
    if NAMES.get(plain) in known:
        return NAMES[plain]
    homes = [k for k in known if k.rpartition(".")[2] == plain]
    return homes[0] if len(homes) == 1 else name


def option_hint(name: str, known: list[str]) -> str:
    if (target := SYNONYMS.get(name)) and target.partition(".")[0] in known:
        return f" Did you mean '--{target}'?"
    group, _, leaf = name.rpartition(".")
    members = {n.rpartition(".")[2]: n for n in known if group and n.rpartition(".")[0] == group}
    if members:
        hint = re.sub("'(.*)'", lambda found: f"'{members[found[1]]}'", nearest(leaf, members))
    else:
        hint = nearest(name, known)
    if not hint and not members:  # perhaps the option of a group, without the group
        leaves = {n.rpartition(".")[2]: n for n in known}
        hint = re.sub("'(.*)'", lambda found: f"'{leaves[found[1]]}'", nearest(name, leaves))
    return hint.replace("'", "'--", 1) if hint else " For all options, use -h all."


def class_choices(option: str) -> tuple[type, dict[str, str]]:
    """The base of the classes that an option may name, and the paths of those with a short name."""
    if option == "optimizer":
        from torch.optim import Optimizer

        from litgpt.train.optimizers import SHORT_NAMES

        return Optimizer, SHORT_NAMES
    from litgpt.data.data_module import DataModule

    return DataModule, {name: f"litgpt.data.{name}" for name in DATA_SETS}


def class_path(option: str, name: str) -> str:
    """The dotted path of a class from its short name or path. Raises `UserError` as `load_class`."""
    short = name.rpartition(".")[2] if option == "data" and name.startswith("litgpt.data.") else name
    if is_unavailable(option, name):  # which another level may replace
        return f"litgpt.data.{short}"
    path = class_choices(option)[1].get(short, name)
    load_class(option, path)
    return path


def is_unavailable(option: str, path: Any) -> bool:
    """Whether this is a data set that only LitGPT has."""
    module, _, name = str(path).rpartition(".")
    return option == "data" and name in UNAVAILABLE and f"{module}.".startswith(("litgpt.data.", "."))


@inner_classes()
def load_class(option: str, path: str) -> type:
    """The class at a dotted path. Raises `UserError` if there is none of the option's kind that training can use."""
    from litgpt.methods.quantize import bitsandbytes

    base, names = class_choices(option)
    module, _, name = path.rpartition(".")
    if is_unavailable(option, path):
        raise UserError(f"--data {name} is not available. For texts of your own, use TextFiles or TinyStories.")
    if module.partition(".")[0] == "bitsandbytes":
        bitsandbytes()
    found: Any = None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (TypeError, ValueError):  # not the name of a module
        pass
    except ImportError as e:
        if not (isinstance(e, ModuleNotFoundError) and f"{module}.".startswith(f"{e.name}.")):
            raise UserError(f"--{option} {path}: {module} cannot be imported. {reason(e)}.") from e
    if not (isinstance(found, type) and issubclass(found, base)) or inspect.isabstract(found):
        kind = "optimizer" if option == "optimizer" else "data set"
        hint = nearest(path, names) or nearest(path, names.values()) or f" Choose from {', '.join(names)}."
        if option == "data" and (Path(path).is_dir() or "/" in path):
            missing = "no file of rows in this folder" if Path(path).is_dir() else "no such file or folder"
            raise UserError(f"--data {path}: {missing}. For a data set on the Hugging Face hub, use hf:ORG/NAME.")
        raise UserError(f"--{option} {path}: no such {kind}.{hint}")
    if name in NO_CLOSURE and module.startswith("torch."):
        raise UserError(f"--{option} {path} does not work with this training loop. Use AdamW.")
    return found


def is_data(word: Any) -> bool:
    """Whether a value of `--data` names files, or is a mapping or a list, instead of the name of a data set."""
    from litgpt.data.json_file import is_data as names_rows

    if not isinstance(word, str) or word.lstrip()[:1] in ("{", "["):
        return True
    return word not in class_choices("data")[1] and names_rows(word)


def data_options(entries: list[Any]) -> dict[str, Any]:
    """The options of the data set that reads these files. Those of other files do not apply to them."""
    from litgpt.data.json_file import from_entries

    name, arguments = from_entries(entries)
    others = dict.fromkeys(("val_path", "columns", "weights", "format") if name == "JSON" else ("val_data_path",))
    own = {f"data.{key}": value for key, value in {**others, **arguments}.items()}
    return {"data": class_path("data", name), **own}


@cache
@inner_classes()
def class_parser(option: str, path: str) -> ArgumentParser:
    """A parser whose options are the arguments of a class, as `data.json_path`."""
    parser = ArgumentParser()
    skip = {1} if option == "optimizer" else None  # its first argument is what it trains
    parser.add_class_arguments(load_class(option, path), option, skip=skip)  # type: ignore[arg-type]
    return parser


def check_required(options: dict[str, Any], actions: dict[str, Action]) -> None:
    required = [name for name, action in actions.items() if action.required]
    empty = (None, "null", "~", "")
    if missing := [REQUIRED.get(name, f"--{name}") for name in required if options.get(name) in empty]:
        raise UserError(f"Missing: {', '.join(missing)}.")


def is_unsafe(value: Any) -> bool:
    """Whether a value is a text that must not be loaded as YAML, as the library does for most types."""
    try:
        check_events(value if isinstance(value, str) else "")
    except (ValueError, RecursionError, yaml.YAMLError):
        return True
    return False


def wrong_value(options: dict[str, Any], actions: dict[str, Action]) -> str:
    """What is wrong with the first option whose value does not have its type; empty if all have theirs."""
    for name, action in actions.items():
        hint, value = action._typehint, options.get(name)  # type: ignore[attr-defined]
        may_be_wrong = name not in CLASSES and not (action.required and value is None)
        if may_be_wrong and not fits(value, hint):
            if (name, str(value)) in REFUSED_VALUES:
                return f"--{name}: {REFUSED_VALUES[name, str(value)]}"
            *others, last = expected = type_words(hint) or [str(hint)]
            phrase = f"{', '.join(others)} or {last}" if others else last
            return f"--{name} {value}: expected {phrase}.{nearest(str(value), expected)}"
    return ""


def fits(value: Any, hint: Any) -> bool:
    if is_unsafe(value) and not {str, Path} & {hint, *get_args(hint)}:
        return False
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_object({"value": value})
    except (ArgumentError, ValueError):
        return False
    return True


def type_words(hint: Any) -> list[str]:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return [str(choice) for choice in get_args(hint)]
    if origin in (Union, types.UnionType):
        return [word for part in get_args(hint) for word in type_words(part)]
    return [KINDS[origin]] if origin in KINDS else []
