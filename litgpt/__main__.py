"""The command line: `litgpt COMMAND ...`. A command's module is imported only when that command runs."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, Optional

from litgpt import __version__
from litgpt.errors import UserError, nearest, without_secrets

COMMANDS = {  # name: (module:function, one line for `litgpt -h`)
    "download": ("litgpt.commands.download:main", "Download a model, or list the known models (download list)."),
    "recipes": ("litgpt.commands.recipes:main", "List, show or copy the recipes that --config takes by name."),
    "finetune_lora": ("litgpt.finetune.lora:setup", "Finetune a model with LoRA (also: finetune)."),
    "finetune_full": ("litgpt.finetune.full:setup", "Finetune all weights of a model."),
    "finetune_adapter": ("litgpt.finetune.adapter:setup", "Finetune a model with LLaMA-Adapter."),
    "finetune_adapter_v2": ("litgpt.finetune.adapter_v2:setup", "Finetune a model with LLaMA-Adapter V2."),
    "data_check": ("litgpt.commands.data_check:main", "Check the data of a finetune before it runs."),
    "data_cache": ("litgpt.commands.data_cache:main", "List or clear the tokens that earlier runs left."),
    "pretrain": ("litgpt.finetune.pretrain:setup", "Train a model on text, from scratch or from existing weights."),
    "plan": ("litgpt.commands.plan:main", "Predict the memory and time of a finetune, and find settings that fit."),
    "tokenizer_train": ("litgpt.commands.tokenizer_train:main", "Train a tokenizer on text files."),
    "generate": ("litgpt.commands.generate:main", "Generate text from a prompt, or answer a file of prompts."),
    "generate_full": ("litgpt.commands.generate:with_100", "Alias of generate for a fully finetuned model."),
    "generate_adapter": ("litgpt.commands.generate:adapter", "Alias of generate for an adapter."),
    "generate_adapter_v2": ("litgpt.commands.generate:adapter_v2", "Alias of generate for an adapter V2."),
    "generate_sequentially": (
        "litgpt.commands.generate:sequentially",
        "Generate text with the layers split across devices.",
    ),
    "generate_speculatively": (
        "litgpt.commands.generate:speculatively",
        "Generate text faster with a small draft model.",
    ),
    "generate_tp": ("litgpt.commands.generate:tensor_parallel", "Generate text with each layer split across devices."),
    "chat": ("litgpt.commands.chat:main", "Chat with a model or an adapter."),
    "serve": ("litgpt.commands.serve:main", "Serve a model with an OpenAI-compatible API and a chat page."),
    "evaluate": ("litgpt.commands.evaluate:main", "Evaluate a model or an adapter on lm-eval tasks."),
    "merge_lora": ("litgpt.commands.merge_lora:main", "Merge a LoRA adapter into its base model."),
    "convert_to_litgpt": ("litgpt.commands.convert:convert_to_litgpt", "Convert a model to LitGPT's format."),
    "convert_from_litgpt": (
        "litgpt.commands.convert:convert_from_litgpt",
        "Convert a LitGPT model to a Hugging Face folder.",
    ),
    "convert_pretrained_checkpoint": (
        "litgpt.commands.convert:convert_pretrained_checkpoint",
        "Extract the weights from a LitGPT pretraining checkpoint.",
    ),
    "verify_resume": (
        "litgpt.commands.verify_resume:main",
        "Check that a stopped and resumed finetune gives identical results.",
    ),
    "validate": (
        "litgpt.commands.validate:main",
        "Check that a model folder is complete and still gives its recorded outputs.",
    ),
    "doctor": ("litgpt.commands.doctor:main", "Show versions, devices and missing packages for a bug report."),
}
MAX_ERROR_LENGTH = 4000
ALIASES = {"finetune": "finetune_lora", "generate_base": "generate"}
WORDS = {"train": "finetune", "sft": "finetune"}  # of other tools


def usage() -> str:
    rows = "\n".join(f"  {spoken(name):30} {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"usage: litgpt COMMAND ...\n\nFinetune open language models from a shell.\n\ncommands:\n{rows}\n\n"
        "Run `litgpt COMMAND -h` for a command's options. For a first run: litgpt finetune lora --config pico/lora\n"
    )


def spoken(command: str) -> str:
    """A command as users type it: `finetune lora`, `verify-resume`."""
    if command.startswith("verify"):
        return command.replace("_", "-")
    return command.replace("_", " ", 1) if command.startswith(("finetune", "data", "tokenizer")) else command


def misspelled(command: str, word: str) -> str:
    """A hint for a misspelled second word of a command, as in `finetune lroa`. The folder of a model gives none."""
    names = [name for name in COMMANDS if name.startswith(f"{command}_")]
    if not names or word.startswith("-") or os.path.exists(word) or os.path.exists(os.path.join("checkpoints", word)):
        return ""
    near = nearest(word, [name.removeprefix(f"{command}_") for name in names])
    return near.replace("'", f"'{command} ", 1)


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
    command, *args = (sys.argv[1:] if argv is None else argv) or ["-h"]
    if command in ("-h", "--help", "help"):
        print(usage())
        return
    if command == "--version":
        print(__version__)
        return
    command = WORDS.get(command, command)
    try:
        # `litgpt finetune lora` means `litgpt finetune_lora`, but `litgpt generate adapter` may name a folder
        is_folder = bool(args) and command in COMMANDS and os.path.isdir(args[0])
        if args and f"{command}_{args[0]}" in (*COMMANDS, *ALIASES) and not is_folder:
            command, args = f"{command}_{args[0]}", args[1:]
        elif args and (hint := misspelled(command, args[0])):
            raise UserError(f"Unknown command '{command} {args[0]}'.{hint} See: litgpt -h")
        typed, command = command, ALIASES.get(command, command.replace("-", "_"))
        if command not in COMMANDS:
            near = nearest(typed, [*map(spoken, COMMANDS), *ALIASES])
            raise UserError(f"Unknown command {typed!r}.{near} See: litgpt -h")
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
