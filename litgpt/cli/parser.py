"""From the words of a command line to the typed arguments of a command's function."""

import gc
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Optional, get_origin

import yaml
from jsonargparse import ActionConfigFile, Namespace, get_loader, set_loader

from litgpt.cli.commands import HANDS_ON, HELP, SWEEP, spoken
from litgpt.cli.help import brief_help, class_help, full_help
from litgpt.cli.help_texts import PLACEHOLDERS
from litgpt.cli.legacy import current_fields, translate
from litgpt.cli.options import FLAGS, Level, as_files, config_options, read_options, resolve_options
from litgpt.cli.recipes import find_recipe
from litgpt.cli.schema import (
    CLASSES,
    Parser,
    check_required,
    class_path,
    current_name,
    is_data,
    is_unsafe,
    option_actions,
    option_hint,
    option_names,
    wrong_value,
)
from litgpt.data import inner_classes
from litgpt.errors import UserError, remark, without_secrets
from litgpt.storage.files import YAML_BYTES, check_events, parse_yaml, read_text
from litgpt.train.args import run_command, run_flags, run_settings, run_words

NO_VALUE = (*HELP, "--print_config")
ALSO_TAKES = {
    "data_check": "litgpt.finetune.preference:dpo"
}  # a command and the function whose options it takes as well
NO_FLAG = {"export": ["repo_id"], "ctl": ["value"]}  # options of a command that need no flag, beside its required ones
FILES = ("data", "prompts")  # options that take several files
TRUTH = ("true", "false", "yes", "no", "null")

library_load = get_loader("yaml")


def load_value(text: str) -> Any:
    """The value of a text, which jsonargparse reads as YAML. Text that is unsafe to load as YAML stays text."""
    check_events(text)
    return library_load(text)


set_loader("yaml", load_value, exceptions=(yaml.YAMLError, ValueError, RecursionError))


def run(where: str, command: str, args: list[str]) -> None:
    """Parse `args` and call the function at `where`, given as module:function; once for each trial of a sweep."""
    if command.startswith("finetune_") and any(word.partition("=")[0] in SWEEP for word in args):
        make_sweep = load("litgpt.commands.sweep:make_sweep")
        make_sweep(command, args, lambda words: load(where)(**parse(where, command, words)))()
        return
    arguments = parse(where, command, args)  # first, because it imports the module without garbage collection
    load(where)(**arguments)


@inner_classes()
def parse(where: str, command: str, args: list[str]) -> Namespace:
    """The arguments of the function at `where`. Values come from the function's defaults, then from `--config`, then
    from flags and the positional model folder, in any order."""
    gc.disable()  # garbage collection would take a quarter of the time to import torch
    try:
        parser = make_parser(where, command)
    finally:
        gc.freeze()  # what was imported stays
        gc.enable()
    words, others = (
        hand_on(args, parser) if command in HANDS_ON else (translate(args, command, option_names(parser)), [])
    )
    levels, printed = read_words(words, parser, others)
    resolved = resolve_options(levels, parser)
    if printed is None:
        check_required(resolved.options, resolved.actions)
    else:  # the library prints the config once it has parsed the options, and exits
        parser._option_string_actions["--print_config"](parser, Namespace(), [printed], "--print_config")
    unsafe = {name: value for name, value in resolved.options.items() if is_unsafe(value)}
    if problem := wrong_value(unsafe, {name: resolved.actions[name] for name in unsafe}):
        raise UserError(problem)
    try:
        settings = parser.parse_object(resolved.nested(), defaults=False)
    except UserError as e:
        raise UserError(wrong_value(resolved.options, resolved.actions) or e) from None
    check_classes(settings.as_dict())
    run_command.set(command)
    run_words.set(("litgpt", *spoken(command).split(), *args))
    run_flags.set(frozenset(levels[-1].options))
    run_settings.set(without_tokens(resolved.recorded(yaml.safe_load(parser.dump(settings, skip_none=False)))))
    return instantiate(parser, settings)


def without_tokens(settings: Any) -> Any:
    """Settings without access tokens, which must not be in the files of a result."""
    if isinstance(settings, dict):
        return {k: None if k == "access_token" else without_tokens(v) for k, v in settings.items()}
    if isinstance(settings, list):
        return [without_tokens(v) for v in settings]
    return without_secrets(settings) if isinstance(settings, str) else settings


def check_classes(value: Any, name: str = "") -> None:
    """Raise `UserError` for a class in any other option than `CLASSES`: the library would make an object of it."""
    if isinstance(value, dict):
        if "class_path" in value and name not in CLASSES:
            raise UserError(
                f"--{name}: {value['class_path']} must not be here. Only --data and --optimizer take a class."
            )
        for key, inner in value.items():
            check_classes(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_classes(inner, name + "[]")


def instantiate(parser: Parser, settings: Namespace) -> Namespace:
    try:
        return parser.instantiate_classes(settings)
    except ValueError as e:  # a class refused its options: its own error is at the bottom of the library's
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise cause or e from None


def load(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


@inner_classes()
def make_parser(where: str, command: str) -> Parser:
    function = load(where)
    first, *others = inspect.signature(function).parameters.values()
    about = (function.__doc__ or "").split("\n\n    Args:")[0]
    parser = Parser(prog=f"litgpt {spoken(command)}", description=about, allow_abbrev=False)
    parser.command, parser.function = command, function
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file, a URL, or the name of a recipe.")
    parser.takes_many = get_origin(first.annotation) is list
    required = itertools.takewhile(lambda p: p.default is p.empty and p.kind is not p.VAR_KEYWORD, others)
    parser.positionals = [first.name, *(p.name for p in required), *NO_FLAG.get(command, [])]
    parser.own = parser.add_function_arguments(function, as_positional=False)
    if command in ALSO_TAKES:
        parser.add_function_arguments(load(ALSO_TAKES[command]), as_positional=False, skip=set(parser.own))
    return parser


def show(text: str) -> NoReturn:
    print(text)
    sys.exit(0)


def read_words(words: list[str], parser: Parser, positional: list[str]) -> tuple[list[Level], Optional[str]]:
    """The levels of options in a command line, and the value of `--print_config`, None without it. `positional` has
    values of the positional option that come before those among the words. Raises `UserError` if a config cannot be
    read, an option lacks its value, or there are too many positionals."""
    levels: list[Level] = []
    flags: list[tuple[str, Any]] = []
    printed = None
    words, positional = list(words), list(positional)
    shows_all = False
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if word in ("-h=all", "--help=all"):
            word, words = flag, ["all", *words]
        if not word.startswith("-") or word == "-":
            positional.append(word)
        elif flag == "--print_config":
            printed = value
        elif word in HELP and words[:1] != ["all"]:
            show(brief_help(parser))
        elif word in HELP:
            words.pop(0)
            shows_all = True
        else:
            name = flag_name(flag, parser)
            if not equals and is_switch(name, words, parser):
                value = "true"
            elif not equals and words and words[0] in HELP:
                continue
            elif not equals:
                is_missing = not words or is_flag(words[0], parser)
                if is_missing and ("." in name or is_flag(flag, parser)):  # an unknown option is reported as such
                    raise UserError(f"{flag} needs a value.")
                value = "" if is_missing else words.pop(0)
            if flag == "--config":
                levels += config_levels(value, parser)
            elif name.endswith(".help"):
                option = name.removesuffix(".help")
                show(class_help(option, class_path(option, value)))
            elif parser.takes_many and name == parser.positionals[0] and not value.startswith("["):
                positional.append(value)
            elif name in FILES and is_data(value):
                flags.append((name, value))
                while words and not words[0].startswith("-") and is_data(words[0]):
                    flags.append((name, words.pop(0)))
            elif "dict[str," in option_type(name, parser) and is_entry(value):
                entries = [value]
                while words and is_entry(words[0]):
                    entries.append(words.pop(0))
                flags.append((name, dict(entry.split("=", 1) for entry in entries)))
            else:
                flags.append((name, value))
    flags = [*name_positionals(positional, dict(flags), parser), *flags]
    prompts = [as_files(value) for name, value in flags if name == "prompts"]
    if len(prompts) > 1:
        entries = [entry for value in prompts for entry in (value if isinstance(value, list) else [value])]
        flags = [*((name, value) for name, value in flags if name != "prompts"), ("prompts", entries)]
    flags.sort(key=lambda flag: "." in flag[0])  # a group comes before its options
    levels = [*levels, Level(FLAGS, read_options(flags, parser, "--"))]
    if shows_all:
        chosen = [(name, level.options.get(name)) for level in levels for name in CLASSES]
        show(full_help(parser, {name: path for name, path in chosen if path}))
    return levels, printed


def config_levels(value: str, parser: Parser, outer: tuple[str, ...] = ()) -> list[Level]:
    """The levels of a config file: first the config that it names itself, if any. Raises `UserError` for a circle."""
    if value in outer:
        raise UserError(f"--config {value} leads back to itself.")
    fields = current_fields(read_config(value), parser.command, value, option_names(parser))
    inner = fields.pop("config", None)
    levels = [] if inner is None else config_levels(str(inner), parser, (*outer, value))
    options, first = config_options(fields, parser, value), parser.positionals[0]
    if parser.takes_many and isinstance(options.get(first), str):
        options[first] = [options[first]]
    return [*levels, Level(value, options)]


def flag_name(flag: str, parser: Parser) -> str:
    if not flag.startswith("--"):
        raise UserError(f"Unknown option {flag}.{option_hint(flag.removeprefix('-'), option_names(parser))}")
    name = current_name(flag.removeprefix("--"), parser)
    if f"--{name}" != flag:
        remark(f"{flag} is called --{name}.")
    return name


def name_positionals(words: list[str], named: dict[str, Any], parser: Parser) -> list[tuple[str, Any]]:
    """The options that words without a flag set, beside those that have a flag."""
    if parser.takes_many:
        return [(parser.positionals[0], words)] if words else []
    names = [name for name in parser.positionals if name not in named]
    files = [word for word in words if is_data(word)] if "data" in option_names(parser) else []
    words = [word for word in words if word not in files]
    if len(words) > len(names):
        only = PLACEHOLDERS.get(parser.positionals[0], parser.positionals[0]).lower()
        several = {1: f"one {only}", 2: "two folders"}
        expected = f"at most {len(names)} words" if parser.command in NO_FLAG else several[len(parser.positionals)]
        hint = word_hint(words[1:], parser)
        words = [*(str(named[name]) for name in parser.positionals if name in named), *words]
        raise UserError(f"Expected {expected}, got {len(words)}: {', '.join(words)}.{hint}")
    return [*zip(names, words), *(("data", file) for file in files)]


def word_hint(words: list[str], parser: Parser) -> str:
    """Which option surplus words may be the value of."""
    known = option_names(parser)
    file = next((word for word in words if Path(word).is_file()), None)
    if file and "prompts" in known:
        return f" To answer the prompts in a file, use --prompts {file}"
    return " To give a prompt, use --prompt '...'." if "prompt" in known else ""


def hand_on(args: list[str], parser: Parser) -> tuple[list[str], list[str]]:
    """The words that belong to this command, and those that belong to the command that it runs."""
    own = [f"--{name}" for name in option_names(parser) if name not in ("config", parser.positionals[0])]
    kept, others, words = list[str](), list[str](), list(args)
    while words:
        word = words.pop(0)
        if word in NO_VALUE or word.partition("=")[0] in own:
            kept.append(word)
            if words and (word in own or (word in HELP and words[0] == "all")):
                kept.append(words.pop(0))
        else:
            others.append(word)
    return kept, others


def option_type(name: str, parser: Parser) -> str:
    return str(getattr(option_actions(parser).get(name), "_typehint", ""))


def is_switch(name: str, words: list[str], parser: Parser) -> bool:
    """Whether this is a yes-or-no option that has no value in front of `words`."""
    hint = option_type(name, parser)
    follows = words[0].lower() if words else "-"
    if "Union" in hint or "|" in hint:  # --resume takes a path as well
        return "bool" in hint and follows.startswith("-")
    return "bool" in hint and follows not in TRUTH


def is_flag(word: str, parser: Parser) -> bool:
    name = word.partition("=")[0]
    return name.startswith("--") and name.removeprefix("--") in option_names(parser)


def is_entry(word: str) -> bool:
    """Whether a word is NAME=VALUE."""
    return re.match(r"[^-={\s][^={\s]*=.", word) is not None


def recipe_hint(url: str) -> str:
    """The name of the recipe that litgpt has in the place of the one at a URL, if any."""
    with suppress(UserError):
        return f" For the recipe that is built in: --config {find_recipe(url).name}" if "config_hub/" in url else ""
    return ""


def read_config(value: str) -> dict[str, Any]:
    """The YAML behind `--config`: a file, a URL, or the name of a recipe. Raises `UserError` if it is not a mapping."""
    if re.match(r"https?://", value):
        from litgpt.storage.http import fetch_text

        try:
            text = fetch_text(value)
        except UserError as e:
            raise UserError(f"{e}{recipe_hint(value)}") from e
    else:
        try:
            path = Path(value) if Path(value).is_file() else find_recipe(value).file
        except UserError as e:
            raise UserError(f"--config {value}: there is no such file. {e}") from e
        text = read_text(path, YAML_BYTES)
    fields = parse_yaml(text, f"--config {value}")
    if not isinstance(fields, dict):
        raise UserError(f"--config {value} has no options.")
    return fields
