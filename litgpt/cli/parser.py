"""From the words of a command line to the typed arguments of a command's function."""

import importlib
import inspect
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Optional, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader

from litgpt.cli.legacy import NAMES, translate, without_refused
from litgpt.cli.options import settle
from litgpt.cli.recipes import find_recipe
from litgpt.errors import UserError, nearest, remark, without_secrets
from litgpt.storage.files import YAML_BYTES, check_events, parse_yaml, read_text
from litgpt.train.args import run_settings, run_words

NO_VALUE = ("-h", "--help", "--print_config")
ALSO_TAKES = {"data_check": "litgpt.finetune.lora:setup"}  # a command to the function whose options it takes as well
TRUTH = ("true", "false", "yes", "no", "null")
HANDS_ON = ("verify_resume",)  # commands that get the words which are no options of theirs as a list
MAY_BE_CLASSES = ("data", "optimizer")
ELSEWHERE = {"lr": "optimizer.lr", "model": "checkpoint_dir", "rank": "lora_r"}  # what other programs call an option


library_load = get_loader("yaml")


def load_value(text: str) -> Any:
    """The value of a text, which jsonargparse reads as YAML. One that it would not survive stays text."""
    check_events(text)
    return library_load(text)


set_loader("yaml", load_value, exceptions=(yaml.YAMLError, ValueError, RecursionError))


class Parser(ArgumentParser):
    """Raises `UserError` where the library would print its usage.

    Attributes:
        positional: The option that a word without a flag is the value of: the first one of the command's function.
        positionals: The same with those that must be given and follow it, for further words.
        takes_many: Whether that option takes a list.
    """

    positional: str
    positionals: list[str]
    takes_many: bool

    def error(self, message: str, ex: Any = None) -> NoReturn:
        raise UserError(one_line(str(ex or message), self)) from None


def run(where: str, command: str, args: list[str]) -> None:
    """Parse `args` and call the function at `where`, given as module:function.

    Values come from the function's defaults, then from `--config`, then from flags and the positional model folder,
    wherever they stand.
    """
    parser = make_parser(where, command)
    configs, rest = take_configs(hand_on(args, parser) if command in HANDS_ON else translate(args, command), parser)
    given = settle(configs, rest, parser)
    words = [f"--config={json.dumps(c, default=str)}" for c in given.configs]  # YAML has dates, JSON has none
    given.words.sort(key=lambda word: "." in word.partition("=")[0])  # --data JSON comes before --data.json_path FILE
    texts = {a.dest for a in parser._actions if getattr(a, "_typehint", None) in (str, Optional[str])}
    flags = dict(word.removeprefix("--").split("=", 1) for word in given.words if "=" in word)
    for options in (*given.configs, flags):
        check_texts({name: value for name, value in options.items() if name not in texts})
    settings = parser.parse_args([*words, *given.words])
    settings.pop("config", None)
    check_classes(settings.as_dict())
    run_words.set(
        ("litgpt", *command.split("_", 1), *args) if command.startswith("finetune") else ("litgpt", command, *args)
    )
    run_settings.set(without_tokens(given.recorded(yaml.safe_load(parser.dump(settings, skip_none=False)))))
    load(where)(**instantiate(parser, settings))


def without_tokens(settings: Any) -> Any:
    """Settings without access tokens, which must not be in the files of a result."""
    if isinstance(settings, dict):
        return {k: None if k == "access_token" else without_tokens(v) for k, v in settings.items()}
    if isinstance(settings, list):
        return [without_tokens(v) for v in settings]
    return without_secrets(settings) if isinstance(settings, str) else settings


def check_texts(value: Any, name: str = "") -> None:
    """Raise `UserError` for a text that jsonargparse would not survive where an option is more than text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_texts(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            check_texts(inner, name)
    elif isinstance(value, str):
        try:
            check_events(value)
        except yaml.YAMLError:
            pass  # it is read as text
        except ValueError as e:
            raise UserError(f"--{name} {value[:40]}: {e}.") from e


def check_classes(value: Any, name: str = "") -> None:
    """Raise `UserError` where the options name a class that is neither the data set nor the optimizer: the library
    would make an object of it, whatever that does."""
    if isinstance(value, dict):
        if "class_path" in value and name not in MAY_BE_CLASSES:
            raise UserError(
                f"--{name}: {value['class_path']} must not be here; only --data and --optimizer are classes."
            )
        for key, inner in value.items():
            below = f"{name}.{key}".lstrip(".")
            check_classes(inner, below)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_classes(inner, name + "[]")


def instantiate(parser: Parser, settings: Namespace) -> Namespace:
    try:
        return parser.instantiate_classes(settings)
    except ValueError as e:  # a class refused its options: its own words are at the bottom of the library's
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise cause or e from None


def load(where: str) -> Callable[..., None]:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def make_parser(where: str, command: str) -> Parser:
    function = load(where)
    first, *others = inspect.signature(function).parameters.values()
    about = (function.__doc__ or "").split("\n\n    Args:")[0]
    parser = Parser(prog=f"litgpt {command}", description=about, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file, a URL, or a recipe's name.")
    parser.positional, parser.takes_many = first.name, get_origin(first.annotation) is list
    required = itertools.takewhile(lambda p: p.default is p.empty and p.kind is not p.VAR_KEYWORD, others)
    parser.positionals = [first.name, *(p.name for p in required)]
    own = parser.add_function_arguments(function, as_positional=False)
    if command in ALSO_TAKES:
        parser.add_function_arguments(load(ALSO_TAKES[command]), as_positional=False, skip=set(own))
    return parser


def take_configs(args: list[str], parser: Parser) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Split the words into what the `--config` files hold, each with its name, and everything else, with the positional
    as an option.

    Raises:
        UserError: a file cannot be read, or more than one positional is there.
    """
    configs: list[tuple[str, dict[str, Any]]] = []
    rest, positional = [], []
    words = list(args)
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            positional.append(word)
        elif word in NO_VALUE or word.startswith("--print_config="):
            rest.append(word)
        else:
            flag, equals, value = word.partition("=")
            if not equals and stands_alone(flag, words, parser):
                value = "true"
            elif not equals:
                if not words:
                    raise UserError(f"{flag} wants a value.")
                value = words.pop(0)
            if of_pairs(flag, parser) and is_pair(value):
                pairs = [value]
                while words and is_pair(words[0]):
                    pairs.append(words.pop(0))
                value = json.dumps(dict(pair.split("=", 1) for pair in pairs))
            if parser.takes_many and flag == f"--{parser.positional}" and not value.startswith("["):
                positional.append(value)
            elif flag == "--config":
                configs.append((value, relocate(read_config(value), parser, value)))
            else:
                rest.append(f"{relocate_flag(flag, parser)}={value}")
    if parser.takes_many and positional:
        return configs, [f"--{parser.positional}={json.dumps(positional)}", *rest]
    names = [n for n in parser.positionals if not any(word.startswith(f"--{n}=") for word in rest)]
    if len(positional) > max(len(names), 1):
        wanted = {1: "One model folder is", 2: "Two folders are"}[len(parser.positionals)]
        hint = where_words_go(positional[1:], parser)
        raise UserError(f"{wanted} wanted, got {len(positional)}: {', '.join(positional)}.{hint}")
    return configs, [*(f"--{n}={p}" for n, p in zip(names or [parser.positional], positional)), *rest]


def where_words_go(words: list[str], parser: Parser) -> str:
    """A hint for words too many: which option they may be the value of."""
    known = option_names(parser)
    file = next((word for word in words if Path(word).is_file()), None)
    if file and "data" in known:
        return f" A file with rows is given as --data JSON --data.json_path {file}"
    if file and "prompts" in known:
        return f" A file with prompts is given as --prompts {file}"
    return " A prompt is given as --prompt '...'." if "prompt" in known else ""


def hand_on(args: list[str], parser: Parser) -> list[str]:
    """The words with those that belong to another command as the value of the positional. Of the parser's own options
    only their last value counts, as always."""
    own = [f"--{name}" for name in option_names(parser) if name not in ("config", parser.positional)]
    mine, others, words = list[str](), list[str](), list(args)
    while words:
        word = words.pop(0)
        if word in NO_VALUE or word.partition("=")[0] in own:
            mine.append(word)
            if word in own and word not in NO_VALUE and words:
                mine.append(words.pop(0))
        else:
            others.append(word)
    return [*([f"--{parser.positional}={json.dumps(others)}"] if others else []), *mine]


def stands_alone(flag: str, words: list[str], parser: Parser) -> bool:
    """Whether this is a yes-or-no option that stands without a value before `words`."""
    types = [str(getattr(a, "_typehint", "")) for a in parser._actions if flag in a.option_strings]
    if not any("bool" in t for t in types):
        return False
    follows = words[0].lower() if words else "-"
    takes_more = any("Union" in t or "|" in t for t in types)  # --resume takes a path as well
    return follows.startswith("-") if takes_more else follows not in TRUTH


def of_pairs(flag: str, parser: Parser) -> bool:
    """Whether this option is one of names and values, which may be given as NAME=VALUE NAME=VALUE."""
    return any("dict[str," in str(getattr(a, "_typehint", "")) for a in parser._actions if flag in a.option_strings)


def is_pair(word: str) -> bool:
    return re.match(r"[^-={\s][^={\s]*=.", word) is not None


def option_names(parser: Parser) -> list[str]:
    """The dotted names of all options, those of the chosen optimizer and data set excepted."""
    names = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    return [n for n in names if not n.startswith("-") and not n.endswith(".help")]


def new_home(name: str, parser: Parser) -> str:
    """The dotted name of an option that older recipes have at the top level, or that had another name; else `name`."""
    known = option_names(parser)
    if name in known or "." in name:
        return name
    if NAMES.get(name) in known:
        return NAMES[name]
    homes = [k for k in known if k.rpartition(".")[2] == name]
    return homes[0] if len(homes) == 1 else name


def relocate_flag(flag: str, parser: Parser) -> str:
    if not flag.startswith("--"):
        raise UserError(f"Unknown option {flag}.{nearest_option(flag.removeprefix('-'), option_names(parser))}")
    home = new_home(flag.removeprefix("--"), parser)
    if f"--{home}" != flag:
        remark(f"{flag} is called --{home}.")
    return f"--{home}"


def relocate(fields: dict[str, Any], parser: Parser, source: str) -> dict[str, Any]:
    """`fields` with keys of older recipes at their place, and a word about each.

    Raises:
        UserError: a key is no option, or a group of options has a value of its own; the library passes over some.
    """
    known = option_names(parser)
    groups = {name.rpartition(".")[0] for name in known}
    fields = without_refused(fields, parser.prog.removeprefix("litgpt "), source)
    moved: dict[str, Any] = {}
    for name, value in fields.items():
        home = new_home(str(name), parser)
        if home.partition(".")[0] not in known:
            raise UserError(f"--config {source}: unknown option {home}.{nearest_option(home, known)}")
        if home in groups and not isinstance(value, (dict, type(None))):
            raise UserError(f"--config {source}: {home} is {value!r}; its options are wanted, as {home}: {{...}}.")
        if home != name:
            remark(f"{source}: {name} is called {home}.")
        group, _, leaf = home.rpartition(".")
        if group:
            moved[group] = {leaf: value, **(moved.get(group) or {})}
        elif isinstance(value, dict) and isinstance(moved.get(home), dict):
            moved[home] |= value
        else:
            moved[home] = value
    return moved


def read_config(value: str) -> dict[str, Any]:
    """The YAML behind `--config`: a file, a URL, or the name of a shipped recipe in any case.

    Raises:
        UserError: there is none, or it is not a mapping.
    """
    if re.match(r"https?://", value):
        from litgpt.storage.http import fetch_text

        text = fetch_text(value)
    else:
        try:
            path = Path(value) if Path(value).is_file() else find_recipe(value).file
        except UserError as e:
            raise UserError(f"--config {value}: there is no such file. {e}") from e
        text = read_text(path, YAML_BYTES)
    fields = parse_yaml(text, f"--config {value}")
    if not isinstance(fields, dict):
        raise UserError(f"--config {value} holds no options.")
    return fields


def one_line(message: str, parser: Parser) -> str:
    """What is wrong, in one line that names the option as it is typed and what is allowed."""
    known = option_names(parser)
    below = re.sub(r'^Parser key "config":\s*', "", message)
    if below != message and below.startswith("--"):
        return below  # already in the words of this function
    if m := re.search(r"unrecognized arguments: --([\w.]+)", message, re.I):
        return f"Unknown option --{m[1]}.{nearest_option(m[1], known)}"
    if m := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return f"Unknown option {m[1]}.{m[2]}.{nearest_option(f'{m[1]}.{m[2]}', known)}"
    if m := re.search(r"Option '([\w.]+)' is not accepted", message):
        return f"Unknown option {m[1]}.{nearest_option(m[1], known)}"
    if m := re.search(r"arguments are required: (.*)", message):
        names = re.findall(r"[\w.]+", m[1])
        spoken = {"checkpoint_dir": "the model folder, or ORG/NAME, or pico, which is built in"}
        spoken |= {"finetune": "the model and the options of a finetune", "repo_id": "the model as ORG/NAME, or: list"}
        return f"Missing: {', '.join(spoken.get(n, f'--{n}') for n in names)}."
    if m := re.search(r'Parser key "([\w.]+)":', message):
        if inner := re.search(r"^ +(?:- )?--([\w.]+ .*)", message, re.M):  # this function's words on an option of m[1]
            return f"--{m[1]}.{inner[1]}"
        if inner := re.search(r"^ +(?:- )?Missing: (--.*)", message, re.M):
            return f"Missing: {inner[1].replace('--', f'--{m[1]}.')}"
        if inner := re.search(r"^ +(?:- )?Unknown option ([\w.]*\w)\.(.*)", message, re.M):
            return f"Unknown option --{m[1]}.{inner[1]}.{inner[2].replace('--', f'--{m[1]}.')}"
        return f"--{m[1]} {wrong_value(message)}"
    return message


def nearest_option(name: str, known: list[str]) -> str:
    if (here := ELSEWHERE.get(name)) and here.partition(".")[0] in known:
        return f" Did you mean '--{here}'?"
    hint = nearest(name, known)
    if not hint:  # maybe a group's option without the group, nearly
        leaves = {n.rpartition(".")[2]: n for n in known}
        hint = re.sub("'(.*)'", lambda found: f"'{leaves[found[1]]}'", nearest(name, leaves))
    return hint.replace("'", "'--", 1) if hint else " See -h for all options."


def wrong_value(message: str) -> str:
    """The library's report on one value, in a few words."""
    if "DataModule" in message and re.search("(?i)is abstract|valid subclass|import path|given class_path", message):
        return no_data_set(message)
    if "Unable to load config" in message:
        return "takes a YAML file with its options."
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    wanted = sorted({kind for kind in re.findall(r"Expected a <class '([\w.]+)'>", message) if kind != "NoneType"})
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    kinds |= {"list": "a list", "dict": "a mapping, as {a: b},"}
    spoken = " or ".join(kinds.get(k, k) for k in wanted)
    if choices := re.search(r"Literal\[(.*?)\]", message):
        allowed = re.findall(r"'([^']*)'", choices[1])
        hint = nearest(given[1], allowed) if given else ""
        other = f", or {spoken}" if spoken else ""
        return f"{given[1] if given else ''}: choose from {', '.join(allowed)}{other}.{hint}"
    path = re.search(r"Expected a dot import path string: (\S+)", message)
    if path and not wanted:
        return f"{path[1]}: no such class.{nearest(path[1], known_classes())}"
    if given and wanted:
        return f"{given[1]}: {spoken} is wanted."
    return " ".join(message.split())


def no_data_set(message: str) -> str:
    """What is wrong with the value of `--data`, and what it may be."""
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    named = re.search(r"class_path'?[=:] ?'([^']*)'", value[1]) if value else None
    if value is None or not (named or "<class 'str'>" in message):
        return f"wants the name of a data set: choose from {', '.join(known_classes())}."
    typed = named[1] if named else value[1]
    hint = nearest(typed.removeprefix("litgpt.data."), known_classes()) or f" Choose from {', '.join(known_classes())}."
    if Path(typed).exists() or Path(typed).suffix in (".json", ".jsonl", ".csv"):
        hint = f" Rows of your own are given as --data JSON --data.json_path {typed}"
    return f"{typed}: no such data set.{hint}"


def known_classes() -> list[str]:
    import litgpt.data

    return litgpt.data.__all__
