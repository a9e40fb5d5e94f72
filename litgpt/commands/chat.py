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
from typing import Optional, Union

from litgpt.commands.generate import check_numbers
from litgpt.errors import UserError, nearest
from litgpt.generate.answers import stop_strings
from litgpt.generate.conversation import Conversation
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.prompt_file import to_line
from litgpt.generate.sampling import Sampling
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName

HELP = """\
/reset         begin a new conversation; the system message stays
/system TEXT   put a system message before the conversation; without a text, remove it
/save FILE     write the conversation as a line of JSON, {"messages": [...]}
/help          show this
/quit          end, as Ctrl-D does
Ctrl-C stops an answer. A prompt that begins with a blank is sent as it is."""
COMMANDS = ("/reset", "/system", "/save", "/help", "/quit", "/exit")
SEND = ("/send", "!submit")  # the second is LitGPT's


def main(
    checkpoint_dir: Path,
    max_new_tokens: int = 50,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Optional[Union[str, list[str]]] = None,
    sys_prompt: Optional[str] = None,
    multiline: bool = False,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    compile: bool = False,
    accelerator: Accelerator = "auto",
    base: Optional[Path] = None,
    seed: int = 1234,
    access_token: Optional[str] = None,
) -> None:
    """Talk with a model, which remembers what was said.

    Prompts are read from the terminal, or from a pipe line by line. Answers go to stdout, everything else to stderr.
    /help lists what can be typed beside prompts.

    Args:
        checkpoint_dir: A base folder or an adapter folder, or the name of one under checkpoints/.
        max_new_tokens: The length of an answer, at most.
        top_k: Draw from so many of the most likely tokens; null for all.
        top_p: Draw from the most likely tokens whose probabilities sum up to this.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the most likely one.
        min_p: Draw from tokens that are at least this likely, as a share of the most likely one.
        repetition_penalty: Above 1 tokens that the text has already become less likely.
        stop: A text that ends the answer, or a JSON list of several; it is left out.
        sys_prompt: A system message before the conversation.
        multiline: Prompts have several lines; a line with /send sends them.
        precision: By default 32-true for weights that are stored so, else bf16-true where the device computes it
            natively, else 32-true.
        quantize: Keep the weights of the blocks in 4 or 8 bits, by bitsandbytes.
        compile: Compile the blocks of the model: a slower start, and then faster steps.
        accelerator: The kind of device.
        base: The base model of an adapter, instead of the recorded one.
        seed: The same seed draws the same answers to the same prompts.
        access_token: Of the Hugging Face hub, for a model that is downloaded; by default what HF_TOKEN holds.
    """
    if access_token is not None:
        os.environ["HF_TOKEN"] = access_token
    check_numbers(max_new_tokens=max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    words = stop_strings(stop)
    loaded = InferenceModel.open(checkpoint_dir, base, precision, quantize, accelerator).prepare(compile)
    conversation = Conversation(loaded, sampling, max_new_tokens, words, seed, sys_prompt)
    terminal = sys.stdin.isatty()
    if terminal:
        how = "a line with /send sends a prompt, " if multiline else ""
        say(f"Chatting with {loaded.source.folder.name}: {how}/help for help, Ctrl-D ends.")
    if conversation.alone:
        say(f"The prompt style {loaded.style.name!r} is for one prompt: the model does not see what came before it.")
    chat(conversation, prompts(line_reader(terminal), multiline, terminal), terminal)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chat(conversation: Conversation, prompts: Iterator[str], terminal: bool) -> None:
    """Answer prompts and obey commands until there are no more."""
    saved: set[Path] = set()
    for prompt in prompts:
        if re.fullmatch(r"/[a-zA-Z]+( .*)?", prompt.rstrip(), re.DOTALL):
            if not obey(conversation, prompt.strip(), saved):
                return
        elif not prompt.strip():
            if terminal:
                say("An empty prompt is not sent. /quit or Ctrl-D ends.")
        else:
            try:
                show(conversation, prompt, terminal)
            except UserError as e:
                say(str(e))
            except KeyboardInterrupt:  # just before the answer began, or just behind its end
                if not terminal:
                    raise
                say("")


def obey(conversation: Conversation, line: str, saved: set[Path]) -> bool:
    """Do what a line with a / says; whether the chat goes on."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        say(HELP)
    elif command == "/reset":
        conversation.reset()
        say("A new conversation.")
    elif command == "/system":
        try:
            conversation.set_system(argument or None)
            say("The system message is set; the conversation goes on." if argument else "There is no system message.")
        except UserError as e:
            say(str(e))
    elif command == "/save":
        save(conversation, argument, saved)
    else:
        say(f"There is no {command}.{nearest(command, COMMANDS)} /help lists what there is.")
    return True


def save(conversation: Conversation, name: str, saved: set[Path]) -> None:
    """Write the conversation; a file that was there before this chat is left alone."""
    if not name:
        say("/save wants the name of a file.")
        return
    if not conversation.messages:
        say("Nothing was said yet, so nothing is saved.")
        return
    path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
    try:
        with open(path, "w" if path.resolve() in saved else "x", encoding="utf-8", newline="\n") as f:
            f.write(to_line({"messages": conversation.messages}))
    except FileExistsError:
        say(f"{path} is there already: choose another name.")
    except OSError as e:
        say(f"{path} cannot be written: {e.strerror}.")
    else:
        saved.add(path.resolve())
        say(f"{len(conversation.messages)} messages are in {path}.")


def show(conversation: Conversation, prompt: str, terminal: bool) -> None:
    """Print the answer while it grows, and what there is to say about its end."""
    began = time.perf_counter()
    with closing(conversation.ask(prompt)) as pieces:  # type: ignore[type-var]
        try:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not terminal:
                raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    seconds = time.perf_counter() - began
    if conversation.finish == "cancelled":
        say("The answer was stopped.")
    elif conversation.full:
        most = conversation.loaded.model.config.block_size
        say(f"The answer ends here, because the context of {most} tokens is full: /reset begins a new conversation.")
    elif conversation.finish == "length":
        say(f"The answer was cut at --max_new_tokens {conversation.max_new_tokens}.")
    if terminal:
        say(f"{conversation.n_new} tokens in {seconds:.2f} s, {conversation.n_new / seconds:.1f} tokens/s")


# what is typed


def line_reader(terminal: bool) -> Callable[[str], str]:
    """Something that shows a mark and returns a line, with its history on the arrow keys; `EOFError` at the end."""
    if not terminal:
        return next_line
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
    except ModuleNotFoundError:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401
        # input() would write its mark among the answers where these go to a file
        return input if sys.stdout.isatty() else partial(next_line, shown=True)
    session: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr))

    def typed(mark: str) -> str:
        try:
            return session.prompt(mark)
        except CancelledError as e:  # of Ctrl-C while the line was being drawn
            raise KeyboardInterrupt from e

    return typed


def next_line(mark: str, shown: bool = False) -> str:
    if shown:
        print(mark, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def prompts(read: Callable[[str], str], multiline: bool, terminal: bool) -> Iterator[str]:
    """The prompts that are typed, up to the end of the input. Ctrl-C drops what was begun."""
    lines: list[str] = []
    while True:
        try:
            line = read("... " if lines else ">> ")
        except EOFError:
            if lines:
                yield "\n".join(lines)
            if terminal:
                say("")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            lines.clear()
            say("\nCtrl-D ends.")
            continue
        if not multiline or (not lines and line.startswith("/") and line.strip() not in SEND):
            yield line
        elif line.strip() in SEND:
            yield "\n".join(lines)
            lines.clear()
        else:
            lines.append(line)
