"""Resolve the options of a command: which value wins among its defaults, the config files and the flags.

A later level beats an earlier one: the defaults, one `--config` after the other, then the flags. Options are kept in
flat dictionaries by their dotted names, `train.epochs`; values of flags are text until jsonargparse reads them by type.
"""

from argparse import Action
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from jsonargparse import ArgumentParser

from litgpt.cli.legacy import CLASS_NAMES
from litgpt.cli.schema import (
    CLASSES,
    class_choices,
    class_parser,
    class_path,
    current_name,
    data_options,
    is_data,
    is_unavailable,
    option_actions,
    option_hint,
    option_names,
)
from litgpt.errors import UserError, remark
from litgpt.storage.files import YAML_BYTES, parse_yaml, read_text

FLAGS = "flags"  # the source of the last level
Options = dict[str, Any]


@dataclass
class Level:
    """The options that one `--config`, or all flags together, set."""

    source: str  # the name of the file or recipe, or `FLAGS`
    options: Options  # `data` and `optimizer` are paths of classes, `data.json_path` is an argument of one


@dataclass
class Resolved:
    options: Options
    actions: dict[str, Action]  # what the parser knows about each of them
    optimizer_arguments: set[str]  # the names of the optimizer's arguments that a level sets

    def nested(self) -> dict[str, Any]:
        """The options for jsonargparse, without the optimizer's learning rate if no level sets it: the run picks it."""
        nested: dict[str, Any] = {}
        for name, value in self.options.items():
            if name == "optimizer.lr" and name not in self.optimizer_arguments:
                continue
            head, _, leaf = name.partition(".")
            if not leaf:
                nested[name] = {"class_path": value, "init_args": {}} if name in CLASSES and value else value
            elif head in CLASSES:
                nested[head]["init_args"][leaf] = value
            else:
                nested.setdefault(head, {})[leaf] = value
        return nested

    def recorded(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The parsed settings for `hyperparameters.yaml`, without defaults that would count as set when the file is
        read as a `--config`: arguments of the optimizer, and a batch size that other options determine."""
        if "optimizer" in settings:
            arguments = settings["optimizer"].get("init_args", {})
            kept = {k: v for k, v in arguments.items() if f"optimizer.{k}" in self.optimizer_arguments}
            settings["optimizer"] = {**settings["optimizer"], "init_args": kept}
        if (settings.get("train") or {}).get("gradient_accumulation_iters") is not None:
            del settings["train"]["global_batch_size"]
        return settings


def resolve_options(levels: list[Level], parser: ArgumentParser) -> Resolved:
    """Merge the levels over the defaults. Raises `UserError` for unknown or contradictory options."""
    defaults = read_options(parser.get_defaults().as_dict().items(), parser, "")
    merged: Options = {}
    for i, level in enumerate(levels):
        if is_unavailable("data", level.options.get("data")) and any(
            "data" in later.options for later in levels[i + 1 :]
        ):
            level = replace(level, options={k: v for k, v in level.options.items() if k.partition(".")[0] != "data"})
        for name in CLASSES:
            if name in level.options and level.options[name] != merged.get(name, defaults.get(name)):
                merged = change_class(merged, name, level)
        for name, value in level.options.items():
            if name.endswith("+"):  # --lora_layers+ 3 appends
                merged[name[:-1]] = [*(as_list(merged.get(name[:-1]))), *value]
            else:
                merged[name] = value
    if is_null(merged.get("optimizer.lr", 0)):
        del merged["optimizer.lr"]  # the default of the class
    actions = option_actions(parser)
    for name in CLASSES:
        if path := merged.get(name, defaults.get(name)):
            own = class_parser(name, path)
            actions |= option_actions(own)
            defaults |= read_options(own.get_defaults().as_dict().items(), own, "")
    merged = join_entries(current_names(merged, actions), actions)
    check_known(merged, levels, actions, parser)
    for pair in PAIRS:
        merged |= pair.resolve(levels, defaults | merged)
    options = {name: value for name, value in (defaults | merged).items() if name in actions}
    return Resolved(options, actions, {name for name in merged if name.startswith("optimizer.")})


def change_class(options: Options, name: str, level: Level) -> Options:
    """The options without the arguments of an earlier class that the class of `level` does not know."""
    path = level.options[name]
    arguments = {k: v for k, v in options.items() if k.startswith(f"{name}.") and k not in level.options}
    if "train.learning_rate" in level.options:  # which takes precedence
        arguments.pop("optimizer.lr", None)
    known = option_actions(class_parser(name, path)) if path else {}
    if arguments and path:
        kept = [f"{k.partition('.')[2]} {v}" for k, v in arguments.items() if k in known]
        dropped = [k.partition(".")[2] for k in arguments if k not in known]
        words = f"keeps {', '.join(kept) or 'nothing'}" + (
            f" and does not take {', '.join(dropped)}" if dropped else ""
        )
        source = "" if level.source == FLAGS else f"{level.source}: "
        kind = "optimizer" if name == "optimizer" else "data set"
        remark(f"{source}--{name} {path.rpartition('.')[2]} {words} (set for another {kind}).")
    return {k: v for k, v in options.items() if k not in arguments or k in known}


def as_list(value: Any) -> list[Any]:
    parsed = parse_yaml(value, value) if isinstance(value, str) else value
    return parsed if isinstance(parsed, list) else [] if parsed is None else [value]


def current_names(options: Options, actions: Mapping[str, Any]) -> Options:
    """The options with today's names for arguments of a class that has another one for them."""
    renamed: Options = {}
    for name, value in options.items():
        current = CLASS_NAMES.get(name, name)
        if current != name and name not in actions and current in actions:
            remark(f"--{name} is called --{current}.")
            renamed[current] = options.get(current, value)
        else:
            renamed[name] = value
    return renamed


def join_entries(options: Options, actions: Mapping[str, Any]) -> Options:
    """The options with single entries of a mapping, as `--log.metadata.team a`, in its value."""
    joined: Options = {}
    for name, value in sorted(options.items(), key=lambda item: item[0].count(".")):
        parent, _, key = name.rpartition(".")
        if name not in actions and parent in actions and parent not in CLASSES:
            entries = joined.get(parent) or {}
            entries = parse_yaml(entries, f"--{parent}") if isinstance(entries, str) else entries
            joined[parent] = {**(entries if isinstance(entries, dict) else {}), key: value}
        else:
            joined[name] = value
    return joined


def check_known(options: Options, levels: list[Level], actions: Mapping[str, Any], parser: ArgumentParser) -> None:
    for name in (name for name in options if name not in actions):
        source = next((level.source for level in levels if name in level.options), FLAGS)
        where = "" if source == FLAGS else f"--config {source}: "
        if name.startswith("data.") and "data" in actions and not options.get("data"):
            names = ", ".join(class_choices("data")[1])
            raise UserError(f"{where}--{name} needs a data set. Choose one with --data: {names}.")
        hint = option_hint(name, [*option_names(parser), *(n for n in actions if "." in n)])
        raise UserError(f"{where}Unknown option --{name}.{hint}")


# what a level sets


def config_options(fields: dict[str, Any], parser: ArgumentParser, source: str) -> Options:
    """The options in a config file. An option in its group wins over the same one at the top level."""
    moved: list[tuple[str, Any]] = []
    items: list[tuple[str, Any]] = []
    for key, value in fields.items():
        name = current_name(str(key), parser)
        if name != str(key):
            remark(f"{source}: {key} is called {name}.")
        (items if name == str(key) else moved).append((name, value))
    return read_options([*moved, *items], parser, f"--config {source}: ")


def read_options(items: Iterable[tuple[str, Any]], parser: ArgumentParser, where: str) -> Options:
    """The options that names and values set, with the members of groups and classes one by one. A class is NAME or
    `{class_path: NAME, init_args: {...}}`; its arguments may also be beside `class_path`. Raises `UserError`, which
    begins with `where`, if a group has a value that is not a mapping, or there is no such class."""
    known = option_names(parser)
    groups = {name.partition(".")[0] for name in known if "." in name}
    options: Options = {}
    files: list[Any] = []
    for name, value in items:
        head, _, leaf = name.partition(".")
        is_class = head in CLASSES and head in known
        leaf = leaf.removeprefix("init_args.") if is_class else leaf
        value = as_files(value) if head == "data" and is_class and not leaf else value
        if isinstance(value, list) and head == "data" and is_class and not leaf:
            if not value:
                raise UserError(f"{where}data is empty. Expected a file.")
            files += value
            continue
        if is_class and leaf in ("", "class_path") and is_null(value):
            if head == "optimizer" and where == "--":
                class_path(head, str(value))
            options |= {"data": None} if head == "data" else {}
        elif is_class and leaf in ("", "class_path") and isinstance(value, str) and value.lstrip()[:1] != "{":
            options[head] = class_path(head, value)
        elif name in groups or (is_class and leaf in ("", "init_args")):
            fields = read_mapping(value, where + name)
            options |= read_options([(f"{head}.{k}", v) for k, v in fields.items()], parser, where)
        elif name.endswith("+"):
            options.setdefault(name, []).append(value)
        else:
            options[f"{head}.{leaf}" if leaf else head] = value
    if files:
        named = data_options(files)
        for name, value in named.items():
            if value is not None and options.get(name, value) != value:
                other = options[name].rpartition(".")[2] if name == "data" else options[name]
                both = f"{where}data names files, which does not go with {'--' * (where == '--')}{name} {other}"
                raise UserError(f"{both}. Pass only one of them.")
        options = named | options
    return options


def as_files(value: Any) -> Any:
    """A value of `--data` that names files, as a list of them. Other values are returned as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_yaml(value, "--data")
    if isinstance(value, dict) and "path" in value:
        return [value]
    return [value] if isinstance(value, str) and is_data(value) else value


def read_mapping(value: Any, where: str) -> dict[str, Any]:
    """A mapping, also as YAML or as the path of a YAML file. Raises `UserError` for anything else."""
    if isinstance(value, str):
        is_path = value.lstrip()[:1] != "{" and len(value) < 1000 and Path(value).is_file()
        value = parse_yaml(read_text(Path(value), YAML_BYTES) if is_path else value, f"{where} {value[:40]}")
    if not isinstance(value, (dict, type(None))):
        raise UserError(f"{where} is {value!r}. Expected a mapping of its options like {{a: 1, b: 2}}.")
    return value or {}


# pairs of options that determine each other


@dataclass(frozen=True)
class Pair:
    """Two options of which only one holds. A later level beats an earlier one, whichever of the two it sets. Within a
    level the first one wins, with a remark unless both agree; two flags that disagree are refused."""

    first: str  # an option that is null by default
    second: str
    agree: Callable[[Any, Any, Options], bool]  # whether two values mean the same, given all options
    second_value: Optional[Callable[[Any], Any]] = None  # of the second option when the first one holds; None: its own
    first_value: Callable[[Any], Any] = lambda value: None  # of the first option, if set, when the second one holds
    depends_on: tuple[str, ...] = ()  # further options that decide whether two values agree

    def resolve(self, levels: list[Level], options: Options) -> Options:
        """The values to change. Raises `UserError` for two flags that disagree."""
        holds, value = "", None
        for level in levels:
            first, second = level.options.get(self.first), level.options.get(self.second)
            if not is_null(first):
                if not is_null(second) and not self.agree(first, second, options):
                    self.report(first, second, level.source, options)
                holds, value = self.first, first
            elif not is_null(second):
                holds, value = self.second, second
            elif self.first in level.options and holds == self.first:
                holds = ""
        if holds == self.first:
            return {self.second: self.second_value(value)} if self.second_value else {}
        is_set = any(not is_null(level.options.get(self.first)) for level in levels)
        return {self.first: self.first_value(value)} if holds and is_set else {}

    def report(self, first: Any, second: Any, source: str, options: Options) -> None:
        if source == FLAGS:
            both = f"--{self.first} {first} and --{self.second} {second}"
            given = ", ".join(f"--{name} {options[name]}" for name in self.depends_on)
            raise UserError(f"{both} contradict each other{f' with {given}' * bool(given)}. Pass only one of them.")
        remark(f"{source}: {self.first} {first} takes precedence over {self.second} {second}.")


def is_null(value: Any) -> bool:
    return value is None or str(value).lower() in ("null", "none", "~", "")


def same_number(a: Any, b: Any, options: Options) -> bool:
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return a == b


def same_batch(iterations: Any, rows: Any, options: Options) -> bool:
    """Whether both come to the same number of rows for each optimizer step."""
    micro = options["train.micro_batch_size"]
    sizes = (1 if micro == "auto" else micro, iterations, options["devices"], options["num_nodes"])
    try:
        micro, times, devices, nodes = map(int, sizes)
        return micro * times * devices * nodes == int(rows)
    except (TypeError, ValueError):  # devices may be auto; what is not a number is refused elsewhere
        return False


def masks_prompt(train_on: Any) -> bool:
    return str(train_on) != "all"


PAIRS = (
    Pair("train.learning_rate", "optimizer.lr", same_number, lambda rate: rate, lambda lr: lr),
    Pair(
        "train.gradient_accumulation_iters",
        "train.global_batch_size",
        same_batch,
        depends_on=("train.micro_batch_size", "devices", "num_nodes"),
    ),
    Pair("train.lr_warmup_fraction", "train.lr_warmup_steps", lambda fraction, steps, _: False, lambda fraction: None),
    Pair(
        "data.train_on",
        "data.mask_prompt",
        lambda train_on, mask, _: masks_prompt(train_on) == (str(mask).lower() in ("true", "yes", "on")),
        masks_prompt,
    ),
)
