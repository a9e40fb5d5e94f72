"""`litgpt completion`, and what its scripts ask for: the words that may follow on a command line.

The options are those of `flags.txt`, so that a Tab imports no library that takes time.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

from litgpt.cli.commands import (
    COMMANDS,
    HANDS_ON,
    HELP,
    PREFIXES,
    WORDS,
    find_command,
    second_words,
    spoken,
)
from litgpt.cli.recipes import shipped_recipes
from litgpt.errors import UserError

FLAGS = Path(__file__).with_name("flags.txt")  # command, flag, default, and choices, separated by tabs
FILES = ":files"  # tells a script to add the names of files
PATHS = ("file", "path", "folder")  # words of the help for values that are files
KINDS = (*PATHS, "recipe", "name", "text", "number", "value", "name=value")  # and for others that are not choices
OPTIMIZER = {"--optimizer.lr": ["number"], "--optimizer.weight_decay": ["number"]}
PLANNED = ["chat", "finetune", "generate", "pretrain", "serve"]  # what `litgpt plan` takes
MODELS = ("MODEL", "DRAFT_MODEL", "base", "checkpoint_dir", "initial_checkpoint_dir", "tokenizer_dir")
CHECKPOINTS = tuple(f"{depth}/{name}" for depth in ("*", "*/*") for name in ("config.json", "model_config.yaml"))
RESULTS = ("out/*/final", "out/*/*/final")  # folders of models that runs leave
Flags = dict[str, list[str]]  # flags, and what each takes


def main(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script with which your shell completes the command lines of litgpt when you press Tab.

    It completes commands, options, their choices, recipes, and the folders of models, and otherwise files. Add it to
    your shell once: `litgpt completion bash >> ~/.bashrc`, `litgpt completion zsh >> ~/.zshrc`, or `litgpt completion
    fish > ~/.config/fish/completions/litgpt.fish`. Terminals that you open afterwards have it.

    Args:
        shell: bash, zsh, or fish.
    """
    print(Path(__file__).with_name(f"complete.{shell}").read_text(encoding="utf-8"), end="")


def candidates(words: list[str]) -> list[str]:
    """What the last of the words after `litgpt` may become. `FILES` in front stands for the names of files."""
    *before, current = split_values(words)
    found = following(before, current)
    return [FILES] * (FILES in found) + sorted({word for word in found if word != FILES and word.startswith(current)})


def split_values(words: list[str]) -> list[str]:
    """The words with a flag apart from its value in `--data=x`, which bash gives as three words."""
    apart: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        apart += [flag, value] if flag.startswith("--") and equals else [word] * (word != "=")
    return [*apart, ""] if words[-1:] in ([], ["="]) else apart


def following(before: list[str], current: str) -> list[str]:
    """What may follow these words, whatever `current` begins with."""
    if not before:
        return [*HELP, "--version"] if current.startswith("-") else [spoken(name).split()[0] for name in COMMANDS]
    first = WORDS.get(before[0], before[0])
    found = second_words(first) if before[1:] == [] and first in PREFIXES and not current.startswith("-") else []
    try:
        command, words = find_command(before)
    except UserError:
        return found
    own = flags()[command]
    if command in HANDS_ON and not (words and words[-1] in own):
        inner = ["finetune"] * (command == "verify_resume") + without_flags(words, own)
        flags_here = list(own) if current.startswith("-") else []
        return [*flags_here, *(following(inner, current) if inner else PLANNED)]
    return [*found, *of_command(command, words, current)]


def of_command(command: str, words: list[str], current: str) -> list[str]:
    """What may follow these words of a command."""
    own = flags()[command]
    known = own | class_flags(own, words)
    last = words[-1] if words else ""
    if current.startswith("-"):
        return [*HELP, *(flag for flag, choices in known.items() if choices != ["hidden"])]
    if last in known and "true" not in known[last]:
        return recipe_names(command) if last == "--config" else values(last, known[last])
    places = [(flag, choices) for flag, choices in own.items() if choices[0].startswith("<")]
    n = len(without_flags(words, known))
    return [*known.get(last, []), *(values(*places[n]) if n < len(places) else [FILES])]


def without_flags(words: list[str], known: Flags) -> list[str]:
    """The words without these flags and their values."""
    kept, rest = list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if word not in known:
            kept.append(word)
        elif rest and ("true" not in known[word] or rest[0] in known[word]):
            rest.pop(0)
    return kept


def class_flags(own: Flags, words: list[str]) -> Flags:
    """The flags of the data set that the words choose, and of optimizers."""
    chosen = {f"--data {name}" for flag, name in pairwise(words) if flag == "--data"} & flags().keys()
    data = flags()[min(chosen, default="--data JSON")] if "--data" in own else {}
    return data | (OPTIMIZER if "--optimizer" in own else {})


def values(flag: str, choices: list[str]) -> list[str]:
    names = [choice.strip("<>") for choice in choices]
    is_model = names[0] in MODELS or flag.removeprefix("--") in MODELS
    found = [n for n in names if n not in KINDS and n[0] != "[" and not (choices[0][0] == "<" and n.isupper())]
    found += model_names() if is_model else []
    is_file = is_model or {*PATHS} & {*names} or not (found or "number" in names)
    return [*found, FILES] if is_file else found


def recipe_names(command: str) -> list[str]:
    """The recipes of a command, or all of them if it has none of its own, and files."""
    recipes = list(shipped_recipes())
    own = [recipe.name for recipe in recipes if recipe.command.startswith(f"litgpt {spoken(command)} ")]
    return [*(own or [recipe.name for recipe in recipes]), FILES]


def model_names() -> list[str]:
    """The models under checkpoints/, the results of runs, and the model that is built in."""
    folder = Path("checkpoints")
    models = [path.parent.relative_to(folder) for pattern in CHECKPOINTS for path in folder.glob(pattern)]
    return ["pico", *(path.as_posix() for path in [*models, *(p for r in RESULTS for p in Path().glob(r))])]


@cache
def flags() -> dict[str, Flags]:
    """The flags of each command, and of each data set as `--data NAME`, with what they take."""
    found: dict[str, Flags] = {}
    for line in FLAGS.read_text(encoding="utf-8").splitlines():
        command, flag, _, choices = line.split("\t")
        found.setdefault(command, {})[flag] = choices.split("|")
    return found
