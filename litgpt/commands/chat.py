"""`litgpt chat`"""

import os
import re
import sys
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Optional

from litgpt.checkpoint.hub import display_name
from litgpt.cli.groups import option_group
from litgpt.errors import UserError, nearest
from litgpt.generate.answer_format import to_line
from litgpt.generate.conversation import Conversation
from litgpt.generate.inference_model import ModelOptions, PromptOptions
from litgpt.generate.sampling import Sampling

HELP = """\
/clear         start a new conversation with the same system message (also /reset)
/retry         answer the last prompt again, with other random numbers
/set NAME X    change temperature, top_k, top_p, min_p, repetition_penalty, or
               max_new_tokens, as in /set temperature 0.2
/show          show the model, the system message, and the settings
/system TEXT   set the system message; without TEXT, remove it
/save FILE     write the conversation as a line of JSON, {"messages": [...]}
/help          show this help
/quit          exit, as Ctrl-D does (also /bye, exit)
Ctrl-C stops an answer. To send a prompt that begins with /, put a space before it."""
QUIT = ("/quit", "/exit", "/bye")
COMMANDS = ("/reset", "/clear", "/retry", "/set", "/show", "/system", "/save", "/help", *QUIT)
SEND = ("/send", "!submit")  # the second is LitGPT's
QUIT_WORDS = ("exit", "quit", "!quit", "!exit")  # the last two are LitGPT's


@option_group("options", PromptOptions, skip=("prompt", "input", "num_samples"))
@option_group("sampling", Sampling)
@option_group("model", ModelOptions, skip=("devices",))
def main(
    checkpoint_dir: Path,
    options: PromptOptions,
    sampling: Sampling,
    model: ModelOptions,
    multiline: bool = False,
    access_token: Optional[str] = None,
) -> None:
    """Chat with a model. It remembers the conversation.

    Prompts are read from the terminal, or line by line from a pipe. Answers go to stdout, everything else to stderr.
    /help lists the commands that can be typed instead of a prompt.

    Args:
        checkpoint_dir: Model folder or adapter folder, or the name of one under checkpoints/.
        sys_prompt: System message before the conversation.
        multiline: Read prompts of several lines. A line with /send sends them.
        access_token: Token of the Hugging Face Hub, for a model that has to be downloaded. By default the value of
            HF_TOKEN.
    """
    if access_token is not None:
        os.environ["HF_TOKEN"] = access_token
    loaded = model.open(checkpoint_dir).prepare(model.compile)
    conversation = Conversation(
        loaded,
        sampling,
        max_new_tokens=options.max_new_tokens,
        stop=options.stop_strings,
        seed=options.seed,
        system=options.sys_prompt,
    )
    terminal = sys.stdin.isatty()
    if terminal:
        send = "/send on a line of its own sends a prompt, " if multiline else ""
        inform(f"Chatting with {display_name(loaded.source.folder)}: {send}/help shows the commands, Ctrl-D exits.")
    if conversation.single_turn:
        inform(
            f"The prompt style {loaded.style.name!r} is for a single prompt: the model does not see earlier messages."
        )
    chat(conversation, prompts(line_reader(terminal), multiline, terminal), terminal)


def inform(text: str, dim: bool = False) -> None:
    if dim and sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR"):
        text = f"\033[2m{text}\033[0m"
    print(text, file=sys.stderr, flush=True)


def chat(conversation: Conversation, prompts: Iterator[str], terminal: bool) -> None:
    saved: set[Path] = set()
    for prompt in prompts:
        try:
            if command := re.fullmatch(r"(/[a-zA-Z?]+)(?:[ \t]+(.*))?", prompt.rstrip(), re.DOTALL):
                name, argument = command[1].lower(), (command[2] or "").strip()
                if name == "/retry":
                    print_answer(conversation, conversation.retry(), terminal)
                elif not run_command(conversation, name, argument, saved):
                    return
            elif prompt.strip():
                print_answer(conversation, conversation.ask(prompt), terminal)
            elif terminal:
                inform("Empty prompts are not sent. /quit or Ctrl-D exits.")
        except UserError as e:
            inform(str(e))
        except KeyboardInterrupt:  # just before the answer began, or just after its end
            if not terminal:
                raise
            inform("")


def run_command(conversation: Conversation, command: str, argument: str, saved: set[Path]) -> bool:
    """Run a command that begins with /. Returns whether the chat goes on."""
    if command in QUIT:
        return False
    if command in ("/help", "/?"):
        inform(HELP)
    elif command in ("/reset", "/clear"):
        conversation.reset()
        inform("Started a new conversation.")
    elif command == "/system":
        conversation.set_system(argument or None)
        inform("Set the system message." if argument else "Removed the system message.")
    elif command == "/set":
        name, value, *_ = (*re.split(r"[\s=:]+", argument, maxsplit=1), "")
        inform(conversation.set(name, value))
    elif command == "/show":
        settings = {"model": display_name(conversation.loaded.source.folder), **conversation.settings()}
        inform("\n".join(f"{name}: {'null' if value is None else value}" for name, value in settings.items()))
    elif command == "/save":
        save(conversation, argument, saved)
    else:
        raise UserError(f"Unknown command {command}.{nearest(command, COMMANDS)} /help lists the commands.")
    return True


def save(conversation: Conversation, name: str, saved: set[Path]) -> None:
    """Write the conversation. Raises `UserError` if it is empty, or a file cannot be written or is not of this chat."""
    if not name:
        raise UserError("Usage: /save FILE")
    if not conversation.messages:
        raise UserError("The conversation is empty. Nothing was saved.")
    path = Path(os.path.expanduser(name))  # Path's own raises if there is no such user
    try:
        with open(path, "w" if path.resolve() in saved else "x", encoding="utf-8", newline="\n") as f:
            f.write(to_line({"messages": conversation.messages}))
    except FileExistsError:
        raise UserError(f"{path} already exists. Choose another name.") from None
    except OSError as e:
        raise UserError(f"Cannot write {path}: {e.strerror}.") from e
    saved.add(path.resolve())
    inform(f"Saved {len(conversation.messages)} messages to {path}.")


def print_answer(conversation: Conversation, answer: Iterator[str], terminal: bool) -> None:
    """Print the answer while it grows, and why it ended if that needs a word."""
    began = time.perf_counter()
    with closing(answer) as texts:  # type: ignore[type-var]
        try:
            for text in texts:
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not terminal:
                raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    seconds = time.perf_counter() - began
    if conversation.finish == "cancelled":
        inform("Stopped the answer.", dim=True)
    elif conversation.context_full:
        context = conversation.loaded.model.config.block_size
        inform(f"The context is full ({context} tokens), so the answer ends here. /clear starts anew.", dim=True)
    elif conversation.finish == "length":
        limit = f"max_new_tokens {conversation.max_new_tokens}"
        inform(f"The answer was truncated at {limit}. /set max_new_tokens null lifts the limit.", dim=True)
    if terminal:
        speed = conversation.n_new / seconds
        inform(f"{conversation.n_new} tokens in {seconds:.2f} s, {speed:.1f} tokens/s", dim=True)


def line_reader(terminal: bool) -> Callable[[str], str]:
    """A function that shows a symbol and returns a line, with history on the arrow keys. Raises `EOFError` at the end
    of the input."""
    if not terminal:
        return next_line
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
    except ModuleNotFoundError:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401
        # input() would write the symbol among the answers if these go to a file
        return input if sys.stdout.isatty() else partial(next_line, shown=True)
    session: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr))

    def typed(symbol: str) -> str:
        try:
            return session.prompt(symbol)
        except CancelledError as e:  # Ctrl-C while the line was being drawn
            raise KeyboardInterrupt from e

    return typed


def next_line(symbol: str, shown: bool = False) -> str:
    if shown:
        print(symbol, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def prompts(read: Callable[[str], str], multiline: bool, terminal: bool) -> Iterator[str]:
    """The prompts that are typed, up to the end of the input. Ctrl-C drops an unfinished one."""
    lines: list[str] = []
    while True:
        try:
            line = read("... " if lines else ">> ")
        except EOFError:
            if lines:
                yield "\n".join(lines)
            if terminal:
                inform("")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            lines.clear()
            inform("\nCtrl-D exits.")
            continue
        if not lines and line.rstrip().lower() in QUIT_WORDS:
            return
        if not multiline or (not lines and line.startswith("/") and line.strip() not in SEND):
            yield line
        elif line.strip() in (*SEND, "!quit", "!exit"):
            yield "\n".join(lines)
            lines.clear()
        else:
            lines.append(line)
