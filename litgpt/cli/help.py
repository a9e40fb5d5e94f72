"""The help of a command in two layers: `-h` fits on one screen, `-h all` has every option, in groups."""

import inspect
import json
import re
import textwrap
import types
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import Namespace

from litgpt.cli.commands import spoken
from litgpt.cli.help_texts import EXAMPLES, IMPORTANT, PAGES, PLACEHOLDERS
from litgpt.cli.schema import CLASSES, Parser, class_parser, load_class, option_actions
from litgpt.data import MODULES as DATA_SETS

WIDTH = 80
MOST, LINES = 15, 40  # options that `-h` shows, and lines that it has at most
COLUMN = 36  # where the help of an option begins; an option that is longer has a line of its own
HIDDEN = ("Ignored", "Has no effect", "Without effect", "Not supported", "Only 1 is supported")  # help of LitGPT's own
CHOICES = {  # of options whose type does not say what they take
    "config": ["file", "recipe"],
    "data": ["file", *sorted(DATA_SETS)],
    "data.json_path": ["file"],
    "data.val_path": ["file"],
    "optimizer": ["name"],
    "prompts": ["file"],
}
TEXTS = {  # in place of the help and the default of other libraries
    "optimizer.lr": "Peak learning rate. A finetune picks it by method and width; elsewhere 0.001, as in LitGPT."
}
NO_BREAK = "\xa0"
WORDS = {bool: ["true", "false"], int: ["number"], float: ["number"], str: ["text"], dict: ["name=value"]}


@dataclass
class Option:
    """An option as the help shows it.

    Args:
        name: Its dotted name, or its placeholder if it needs no flag, such as MODEL.
        choices: What it takes, such as `number`, or `true` and `false`.
    """

    name: str
    choices: list[str]
    text: str
    default: str = ""

    def lines(self, column: int, brief: bool) -> list[str]:
        """The option with its help, which begins in this column. Brief help is one sentence."""
        head, is_complete = self.head(brief)
        text = first_clause(self.text, 2 * (WIDTH - column)) if brief else self.text
        if not brief and not is_complete:
            text += f" One of {', '.join(self.choices)}."
        if self.default and not (brief and self.default == "false"):
            text += f" [default:{NO_BREAK}{self.default.replace(' ', NO_BREAK)}]"
        lines = wrap(text, WIDTH - column).replace(NO_BREAK, " ").splitlines()
        first = head if len(head) + 2 > column else f"{head:{column}}{''.join(lines[:1])}".rstrip()
        return [first, *(" " * column + line for line in (lines if first == head else lines[1:]))]

    def head(self, brief: bool) -> tuple[str, bool]:
        """The option with what it takes, and whether that has all choices."""
        flag = f"  --{self.name} " if self.choices else f"  {self.name}"
        shown, n = "|".join(self.choices), len(self.choices)
        while len(flag + shown) > (COLUMN - 2 if brief else WIDTH) and n > 1:
            n -= 1
            shown = "|".join([*self.choices[:n], "..."])
        return flag + shown, n == len(self.choices)


SWEEPS = [
    Option(
        "sweep",
        ["NAME=VALUES"],
        "An option and its values, such as lora_r=8,32 or optimizer.lr=log:1e-5:1e-3. Repeat it for more.",
    ),
    Option("sweep_random", ["N"], "This many random combinations instead of all; needed for ranges."),
    Option(
        "sweep_budget",
        ["TIME"],
        "Stop the worse half of the trials early, twice, and all of them after a time, such as 15m.",
    ),
]


def brief_help(parser: Parser) -> str:
    """One screen: the usage, two examples, the options that most people need, and where the rest is."""
    own = {"config", *(name.partition(".")[0] for name in parser.own)}
    options = [*options_of(parser), *(o for shown in class_sections(parser, {}).values() for o in shown)]
    order = {name: i for i, name in enumerate(IMPORTANT)}
    options = [o for o in options if o.name.partition(".")[0] in own and ("." not in o.name or o.name in order)]
    options.sort(key=lambda option: order.get(option.name, len(order)))  # the others keep their order
    start = f"{usage(parser)}\n\n{wrap(first_sentence(about(parser)))}\n\nExamples:\n"
    start += "".join(f"  litgpt {example}\n" for example in EXAMPLES[parser.command])
    sweeps = "Sweeps:      --sweep lr=1e-4,3e-4 (tutorials/compare_runs.md)\n" if sweepable(parser) else ""
    end = f"{sweeps}All options: litgpt {spoken(parser.command)} -h all\nGuide:       tutorials/{page(parser.command)}"
    texts = (f"{start}\n{table([*words_of(parser), *options[:n]], brief=True)}\n\n{end}" for n in range(MOST, 0, -1))
    return next(text for text in texts if len(text.splitlines()) <= LINES)


def full_help(parser: Parser, classes: Mapping[str, str]) -> str:
    """Every option in its group, with those of the classes that `--data` and `--optimizer` choose."""
    sections: dict[str, list[Option]] = {}
    for option in options_of(parser):
        sections.setdefault(title(option.name, parser), []).append(option)
    sections |= class_sections(parser, classes)
    if sweepable(parser):
        sections["Sweeps, a run for each combination of values (tutorials/compare_runs.md)"] = SWEEPS
    paragraphs = [*about(parser).split("\n\n"), *(["Without a flag:"] if parser.positionals else [])]
    words = f"{table(words_of(parser))}\n\n" if parser.positionals else ""
    body = "\n\n".join(f"{wrap(heading)}:\n{table(options)}" for heading, options in sections.items())
    return (
        f"{usage(parser)}\n\n" + "\n\n".join(map(wrap, paragraphs)) + f"\n{words}{body}\n\n"
        "--print_config prints the settings as YAML, for --config.\n"
        f"Guide: tutorials/{page(parser.command)}"
    )


def class_help(option: str, path: str) -> str:
    """The options of a class that `--data` or `--optimizer` may name."""
    text = first_sentence(inspect.getdoc(load_class(option, path)) or "")
    return f"{wrap(text)}\n\n{table(class_options(option, path))}"


def sweepable(parser: Parser) -> bool:
    return parser.command.startswith("finetune_")


def usage(parser: Parser) -> str:
    actions = option_actions(parser)
    words = [PLACEHOLDERS.get(name, name.upper()) for name in parser.positionals]
    words = [word if actions[name].required else f"[{word}]" for name, word in zip(parser.positionals, words)]
    words = [f"{words[0].removesuffix(' ...')} ...", *words[1:]] if parser.takes_many else words
    files = ["[FILE ...]"] if "data" in actions else []
    return " ".join([f"usage: litgpt {spoken(parser.command)}", *words, *files, "[options]"])


def about(parser: Parser) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (parser.description or "").split("\n\n"))


def page(command: str) -> str:
    return PAGES[max((start for start in PAGES if command.startswith(start)), key=len)]


# the options


def words_of(parser: Parser) -> list[Option]:
    """The options that need no flag."""
    texts = {name: plain(action.help) for name, action in option_actions(parser).items()}
    return [Option(PLACEHOLDERS.get(name, name.upper()), [], texts[name]) for name in parser.positionals]


def options_of(parser: Parser) -> list[Option]:
    """The other options, without those that have no effect."""
    config = Option("config", CHOICES["config"], plain(parser._option_string_actions["--config"].help))
    return [config, *(o for o in visible(option_actions(parser)) if o.name not in parser.positionals)]


def visible(actions: Mapping[str, Action]) -> Iterator[Option]:
    for name, action in actions.items():
        if not str(action.help).startswith(HIDDEN):
            choices = choices_of(name, action._typehint)  # type: ignore[attr-defined]
            default = "" if name in TEXTS else default_text(action.default)
            yield Option(name, choices, TEXTS.get(name) or plain(action.help), default)


def class_sections(parser: Parser, chosen: Mapping[str, str]) -> dict[str, list[Option]]:
    """The options of classes by their headings: of those that are chosen, or else of the default ones."""
    sections = {}
    for name in CLASSES:
        if name in option_actions(parser):
            default = "litgpt.data.JSON" if parser.command != "pretrain" else "litgpt.data.TextFiles"
            path = chosen.get(name) or (default if name == "data" else "torch.optim.AdamW")
            heading = f"Options of --{name} {path.rpartition('.')[2]} (for another: --{name} NAME -h all)"
            sections[heading] = class_options(name, path)
    return sections


def class_options(name: str, path: str) -> list[Option]:
    options = list(visible(option_actions(class_parser(name, path))))
    for option in options:
        if not path.startswith("litgpt."):  # such help is for readers of Python
            text = re.sub(r" *\(default:.*|`_?", "", first_sentence(option.text)).rstrip(".")
            option.text = f"{text[:1].upper()}{text[1:]}."
    return options


def title(name: str, parser: Parser) -> str:
    """The heading of an option's section: of the group that it belongs to, as code and docstrings have it."""
    function = parser.function
    if "." in name:
        return next(str(g.title) for g in parser._action_groups for a in g._group_actions if a.dest == name)
    if name in (titles := getattr(function, "option_titles", {})):
        return titles[name]
    return "Options" if name == "config" or name in inspect.signature(function).parameters else "The run"


# how they are written


def choices_of(name: str, hint: Any) -> list[str]:
    """What an option takes, in words that are not types of Python."""
    if name in CHOICES:
        return CHOICES[name]
    leaf, origin = name.rpartition(".")[2], get_origin(hint) or hint
    if origin is Literal:
        return [str(choice) for choice in get_args(hint)]
    if origin in (Union, types.UnionType):
        inner = [word for part in get_args(hint) if part is not type(None) for word in choices_of(name, part)]
        plainer = [word for word in inner if "=" not in word and "[" not in word and word != "value"]
        return list(dict.fromkeys(plainer or inner))
    if origin is Path:
        return ["folder" if "dir" in leaf else "file" if leaf.endswith(("file", "filepath", "config")) else "path"]
    if origin is str and leaf.endswith("path"):
        return ["path"]
    if origin in WORDS:
        return WORDS[origin]
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        inner = choices_of(name, get_args(hint)[0]) if get_args(hint) else ["text"]
        return [f"[{inner[0]}, ...]"]
    return ["value"]


def default_text(default: Any) -> str:
    if isinstance(default, (dict, Namespace)) and "class_path" in default:
        default = str(default["class_path"]).rpartition(".")[2]
    if default is None or default in ("", [], {}, ()):
        return ""
    return str(default) if isinstance(default, (str, Path)) else json.dumps(default, default=str)


def plain(text: Any) -> str:
    return " ".join(str(text or "").replace("%%", "%").split())


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[^\s.]{2}\.)\s+(?=[A-Z`-])", plain(text), maxsplit=1)[0]


def first_clause(text: str, length: int) -> str:
    """The first sentence without parentheses and what a semicolon separates, nor what a comma does if it is longer."""
    sentence = re.sub(r" \([^)]*\)|\.$|;.*", "", first_sentence(text))
    while len(sentence) > length and ", " in sentence[length // 3 :]:
        sentence = sentence.rpartition(", ")[0]
    return f"{sentence}."


def wrap(text: str, width: int = WIDTH) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)


def table(options: list[Option], brief: bool = False) -> str:
    heads = [len(option.head(brief)[0]) + 2 for option in options]
    column = max((n for n in heads if n <= COLUMN), default=COLUMN)
    return "\n".join(line for option in options for line in option.lines(column, brief))
