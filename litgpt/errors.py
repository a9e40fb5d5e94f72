"""Errors that a user can cause, and helpers for their messages."""

import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import ModuleType
from typing import Any

BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError)  # errors of the code, not of a user
SECRETS = {  # patterns that no message may show, and their replacements
    re.compile(r"(?<=://)[^/?#\s'\"]*@"): "***@",  # user and password in a URL
    re.compile(r"(?<=[?&;])([\w.-]*(?:token|key|secret|sig|pass|auth|cred)[\w.-]*=)[^&;#\s'\"]+", re.I): r"\1***",
    re.compile(r"\b(Bearer|Basic) +[^\s'\"]+"): r"\1 ***",
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"): "hf_***",
    re.compile(r"(access_token['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+"): r"\1***",
}


def without_secrets(text: str) -> str:
    """The text with passwords and access tokens masked."""
    for pattern, shown in SECRETS.items():
        text = pattern.sub(shown, text)
    return text


class UserError(ValueError):
    """An error that the user can fix. The command line shows its message in one line, then each of its hints in a line,
    and exits with 2."""

    def __init__(self, message: object = "", hints: Iterable[str] = ()) -> None:
        self.message, self.hints = without_secrets(str(message)), [without_secrets(hint) for hint in hints]
        super().__init__("\n  ".join([self.message, *self.hints]))


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word that is closest to `word`, or an empty string."""
    by_lower = {k.lower(): k for k in known}
    close = 0.6 if len(word) > 3 else 0.7  # gpu must not suggest cpu
    match = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=close)
    return f" Did you mean {by_lower[match[0]]!r}?" if match else ""


def remark(text: str) -> None:
    """Print a remark on stderr, only from the first process of a run."""
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")):
        with suppress(OSError, ValueError):  # stderr may be closed
            print(f"litgpt: {without_secrets(text)}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """An error in one line, with its type where the message alone is not meant for users."""
    words = " ".join(str(error).split())
    return words if words and isinstance(error, (OSError, UserError)) else f"{type(error).__name__}: {words}"


def kind(value: Any) -> str:
    """The type of a value from JSON or YAML, in words."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def brief(value: Any) -> str:
    """A value as JSON, truncated to 40 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


def require(module: str, extra: str) -> ModuleType:
    """Import a module that an optional extra installs. Raises `UserError` with the pip command if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise UserError(
            f"This needs the package {e.name!r}. In the clone of litgpt, run: {install_command(extra)}"
        ) from e


def install_command(extra: str) -> str:
    """Run in a clone. The name litgpt belongs to another project on the package index."""
    return f"pip install '.[{extra}]'"
