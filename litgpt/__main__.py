"""The command line: `litgpt COMMAND ...`. A command's module is imported only when that command runs."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, Optional

from litgpt import __version__
from litgpt.cli.commands import (
    ALIASES,
    COMMANDS,
    COMPLETE,
    HELP,
    PREFIXES,
    WORDS,
    find_command,
    prefix_help,
    usage,
)
from litgpt.errors import UserError, without_secrets

MAX_ERROR_LENGTH = 4000


def main(argv: Optional[list[str]] = None) -> None:
    """Run one command.

    Raises:
        SystemExit: with 2 for an error that the user can fix; stderr has the reason in one line.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `litgpt chat pico <&-`
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show becomes a question mark
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # the caller has already read from it
            sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer reports text that is not UTF-8
    words = (sys.argv[1:] if argv is None else list(argv)) or ["-h"]
    if words[0] == "help" and words[1:]:
        words = [*words[1:], "-h"]
    try:
        if (text := quick_answer(words)) is not None:
            print(text)
            return
        command, args = find_command(words)
        from litgpt.cli.parser import run

        run(COMMANDS[command][0], command, args)
    except UserError as e:
        fail(e.message, e.hints)
    except BrokenPipeError:  # the reader of stdout is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as e:
        fail(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")
    except KeyboardInterrupt:
        sys.exit(130)


def quick_answer(words: list[str]) -> Optional[str]:
    """What a command line prints that needs no command; None for others."""
    first, second = words[0], words[1] if words[1:] else ""
    prefix = WORDS.get(first, first)
    if first in (*HELP, "help"):
        return usage()
    if first == "--version":
        return __version__
    if first == COMPLETE:
        from litgpt.cli.completion import candidates

        return "\n".join(candidates(words[1:]))
    if prefix in PREFIXES and second in HELP and (not words[2:] or prefix not in ALIASES):
        return prefix_help(prefix)
    return None


def fail(message: str, hints: Sequence[str] = ()) -> NoReturn:
    if os.environ.get("LITGPT_TRACEBACK"):
        raise
    with suppress(OSError, ValueError):  # stderr may be closed
        text = " ".join(without_secrets(message).split())
        print(
            f"litgpt: error: {text if len(text) <= MAX_ERROR_LENGTH else f'{text[:MAX_ERROR_LENGTH]} ...'}",
            *(f"\n  {hint}" for hint in hints),
            sep="",
            file=sys.stderr,
        )
    sys.exit(2)


if __name__ == "__main__":
    main()
