"""The command line: `litgpt COMMAND ...`. A command's module is imported only when that command runs."""

import gc
import io
import os
import sys
from contextlib import suppress
from typing import NoReturn, Optional

from litgpt import __version__
from litgpt.errors import UserError, nearest, without_secrets

COMMANDS = {  # name: (where, one line for `litgpt -h`)
    "download": ("litgpt.commands.download:main", "Download a model, or list the known ones (download list)."),
    "recipes": ("litgpt.commands.recipes:main", "List, show and copy the recipes that --config takes by name."),
    "finetune_lora": ("litgpt.finetune.lora:setup", "Finetune a model with LoRA (also: finetune)."),
    "finetune_full": ("litgpt.finetune.full:setup", "Finetune all weights of a model."),
    "finetune_adapter": ("litgpt.finetune.adapter:setup", "Finetune a model with LLaMA-Adapter."),
    "finetune_adapter_v2": ("litgpt.finetune.adapter_v2:setup", "Finetune a model with LLaMA-Adapter V2."),
    "data_check": ("litgpt.commands.data_check:main", "Look at the data of a finetune before it runs."),
    "pretrain": ("litgpt.finetune.pretrain:setup", "Train all weights of a model on text, from scratch or further."),
    "tokenizer_train": ("litgpt.commands.tokenizer_train:main", "Train a tokenizer on text files."),
    "generate": ("litgpt.commands.generate:main", "Continue a prompt with a model or an adapter, or answer a file."),
    "generate_full": ("litgpt.commands.generate:with_100", "The same, as LitGPT calls it for a finetuned model."),
    "generate_adapter": ("litgpt.commands.generate:with_100", "The same, as LitGPT calls it for an adapter."),
    "generate_adapter_v2": ("litgpt.commands.generate:with_100", "The same, as LitGPT calls it for an adapter V2."),
    "generate_sequentially": ("litgpt.commands.generate:sequentially", "The same, with the layers on several devices."),
    "generate_speculatively": (
        "litgpt.commands.generate:speculatively",
        "Continue a prompt with the help of a smaller model of the same tokenizer.",
    ),
    "generate_tp": (
        "litgpt.commands.generate:tensor_parallel",
        "Continue a prompt with a part of each layer on every device.",
    ),
    "chat": ("litgpt.commands.chat:main", "Talk with a model or an adapter."),
    "serve": ("litgpt.serve.main:main", "Answer over HTTP as OpenAI's interface does, with a page to chat."),
    "evaluate": ("litgpt.commands.evaluate:main", "Score a model or an adapter on the tasks of lm-eval."),
    "merge_lora": ("litgpt.commands.merge_lora:main", "Fold a LoRA adapter into its base model."),
    "convert_to_litgpt": ("litgpt.commands.convert_to_litgpt:main", "Write a model in LitGPT's form too."),
    "convert_from_litgpt": (
        "litgpt.commands.convert_from_litgpt:main",
        "Write a model of LitGPT's as a Hugging Face folder.",
    ),
    "convert_pretrained_checkpoint": (
        "litgpt.commands.convert_pretrained_checkpoint:main",
        "Take the weights out of a checkpoint of LitGPT's pretraining.",
    ),
    "verify_resume": (
        "litgpt.commands.verify_resume:main",
        "Try whether a finetune that is stopped and resumed gives the same numbers.",
    ),
    "validate": ("litgpt.commands.validate:main", "Say whether a folder is whole and answers as it did."),
    "doctor": ("litgpt.commands.doctor:main", "Show versions, devices and what is missing, for a bug report."),
}
MOST = 4000  # characters of an error
SHORT = {"finetune": "finetune_lora"}


def usage() -> str:
    rows = "\n".join(f"  {spoken(name):30} {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"usage: litgpt COMMAND ...\n\nFinetune open language models from a shell.\n\ncommands:\n{rows}\n\n"
        "`litgpt COMMAND -h` lists a command's options. To see it work: litgpt finetune lora --config pico/lora\n"
    )


def spoken(command: str) -> str:
    """A command as it is typed: `finetune lora`, `verify-resume`."""
    if command.startswith("verify"):
        return command.replace("_", "-")
    return command.replace("_", " ", 1) if command.startswith(("finetune", "data", "tokenizer")) else command


def misspelt(command: str, word: str) -> str:
    """A hint where the second word of a command is nearly right: `finetune lroa`. A model that is there is none."""
    names = [name for name in COMMANDS if name.startswith(f"{command}_")]
    if not names or word.startswith("-") or os.path.exists(word) or os.path.exists(os.path.join("checkpoints", word)):
        return ""
    near = nearest(word, [name.removeprefix(f"{command}_") for name in names])
    return near.replace("'", f"'{command} ", 1)


def main(argv: Optional[list[str]] = None) -> None:
    """Run one command.

    Raises:
        SystemExit: with 2 where the user has something to mend; the reason stands in one line on stderr.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `litgpt chat pico <&-`
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # a program that calls this function has read from it already
            sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer says which text is not UTF-8
    command, *args = (sys.argv[1:] if argv is None else argv) or ["-h"]
    if command in ("-h", "--help", "help"):
        print(usage())
        return
    if command == "--version":
        print(__version__)
        return
    try:
        # `litgpt finetune lora` is `litgpt finetune_lora`; `litgpt generate adapter` is about a folder if there is one
        is_folder = bool(args) and command in COMMANDS and os.path.isdir(args[0])
        if args and f"{command}_{args[0]}" in COMMANDS and not is_folder:
            command, args = f"{command}_{args[0]}", args[1:]
        elif args and (hint := misspelt(command, args[0])):
            raise UserError(f"Unknown command '{command} {args[0]}'.{hint} See: litgpt -h")
        typed, command = command, SHORT.get(command, command.replace("-", "_"))
        if command not in COMMANDS:
            near = nearest(typed, [*map(spoken, COMMANDS), *SHORT])
            raise UserError(f"Unknown command {typed!r}.{near} See: litgpt -h")
        gc.set_threshold(100_000)  # a fourth of the time that importing torch takes is Python's search for garbage
        from litgpt.cli.parser import run

        run(COMMANDS[command][0], command, args)
    except UserError as e:
        fail(str(e))
    except BrokenPipeError:  # whoever read our output has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as e:
        fail(f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> NoReturn:
    if os.environ.get("LITGPT_TRACEBACK"):
        raise
    with suppress(OSError, ValueError):  # stderr is closed: the exit code says it
        text = " ".join(without_secrets(message).split())
        print(f"litgpt: error: {text if len(text) <= MOST else f'{text[:MOST]} ...'}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
