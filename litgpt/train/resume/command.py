"""The commands that resume a run or start it over, as they were typed."""

import shlex
from collections.abc import Callable
from typing import Optional

from litgpt.errors import without_secrets
from litgpt.train.args import run_settings, run_words

BOOLEANS = ("true", "false", "yes", "no", "null")


def again(saved: bool) -> str:
    """The command that resumes this run. If it has not saved a checkpoint, keep the --resume that it was started
    with."""
    words = typed()
    was = take_out(words, "--resume", lambda value: not value.startswith("-"))
    if (run_settings.get() or {}).get("overwrite"):
        words += ["--overwrite", "false"]
    return shown([*words, "--resume", was if was and not saved else "true"])


def afresh() -> str:
    """The command that starts this run over."""
    words = typed()
    take_out(words, "--resume", lambda value: not value.startswith("-"))
    return shown([*words, "--overwrite", "true"])


def typed() -> list[str]:
    """The words of the command line, without those that are for one start only."""
    words = list(run_words.get()) or ["litgpt", "..."]
    take_out(words, "--overwrite", lambda value: value.lower() in BOOLEANS)
    take_out(words, "--train.pause_after", lambda value: True)
    return words


def shown(words: list[str]) -> str:
    before = ["", *words]  # a token follows its flag, or is part of a word
    words = ["***" if flag.endswith("access_token") else without_secrets(word) for flag, word in zip(before, words)]
    return shlex.join(words)


def take_out(words: list[str], flag: str, is_value: Callable[[str], bool]) -> Optional[str]:
    """Remove a flag and its value from the words of a command line. Returns the last value."""
    last = None
    for i in reversed([i for i, word in enumerate(words) if word == flag or word.startswith(f"{flag}=")]):
        follows = words[i] == flag and i + 1 < len(words) and is_value(words[i + 1])
        value = words[i + 1] if follows else words[i].partition("=")[2]
        last = last or value
        del words[i : i + 1 + follows]
    return last
