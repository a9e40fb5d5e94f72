"""The table of commands, and how people type them. Imports nothing that takes time, as `litgpt -h` reads it."""

import os

from litgpt.errors import UserError, nearest

GROUPS = {  # title: {name: (module:function, one line for `litgpt -h`)}
    "Train": {
        "finetune_lora": ("litgpt.finetune.lora:setup", "Finetune a model with LoRA (also: finetune)."),
        "finetune_full": ("litgpt.finetune.full:setup", "Finetune all weights of a model."),
        "finetune_adapter": ("litgpt.finetune.adapter:setup", "Finetune a model with LLaMA-Adapter."),
        "finetune_adapter_v2": ("litgpt.finetune.adapter_v2:setup", "Finetune a model with LLaMA-Adapter V2."),
        "finetune_dpo": ("litgpt.finetune.preference:dpo", "Finetune on pairs: chosen and rejected answers."),
        "finetune_kto": ("litgpt.finetune.preference:kto", "Finetune on answers labeled good or bad."),
        "finetune_orpo": ("litgpt.finetune.preference:orpo", "Finetune on pairs with ORPO."),
        "finetune_simpo": ("litgpt.finetune.preference:simpo", "Finetune on pairs with SimPO."),
        "finetune_cpo": ("litgpt.finetune.preference:cpo", "Finetune on pairs with CPO."),
        "pretrain": ("litgpt.finetune.pretrain:setup", "Train a model on text, from scratch or further."),
        "recipes": ("litgpt.commands.recipes:main", "List, show, or copy the recipes that --config takes."),
        "plan": ("litgpt.commands.plan:main", "Predict memory and time, and find settings that fit."),
    },
    "Use": {
        "download": ("litgpt.commands.download:main", "Download a model, or list models: download list."),
        "chat": ("litgpt.commands.chat:main", "Chat with a model or an adapter."),
        "generate": ("litgpt.commands.generate:main", "Answer a prompt, or a file of prompts."),
        "generate_speculatively": (
            "litgpt.commands.generate:speculatively",
            "Generate text faster with a small draft model.",
        ),
        "generate_tp": ("litgpt.commands.generate:tensor_parallel", "Generate text with layers split across devices."),
        "serve": ("litgpt.commands.serve:main", "Serve a model: OpenAI-compatible API and chat page."),
        "evaluate": ("litgpt.commands.evaluate:main", "Evaluate a model on rows or on the tasks of lm-eval."),
    },
    "Share": {
        "merge_lora": ("litgpt.commands.merge_lora:main", "Merge a LoRA adapter into its base model."),
        "export": ("litgpt.commands.export:main", "Write a model for other programs, or upload it."),
    },
    "Data": {
        "data_check": ("litgpt.commands.data_check:main", "Check the data of a finetune before it runs."),
        "data_cache": ("litgpt.commands.data_cache:main", "List or clear the tokens that earlier runs left."),
        "tokenizer_train": ("litgpt.commands.tokenizer_train:main", "Train a tokenizer on text files."),
    },
    "Look": {
        "runs_list": ("litgpt.commands.runs:main", "List runs with their settings and losses (also: runs)."),
        "runs_watch": ("litgpt.commands.runs:watch", "Show that list and update it."),
        "runs_diff": ("litgpt.commands.runs:diff", "Show how two runs differ."),
        "ctl": ("litgpt.commands.ctl:main", "Tell a live run to save, validate, answer, or stop."),
        "validate": ("litgpt.commands.validate:main", "Check that model folders are complete and unchanged."),
        "report": ("litgpt.commands.report:main", "Write a report of runs as one HTML file."),
        "rerun": ("litgpt.commands.rerun:main", "Repeat a finished run, and compare its losses."),
        "verify_resume": ("litgpt.commands.verify_resume:main", "Check that a resumed finetune gives the same result."),
        "doctor": ("litgpt.commands.doctor:main", "Show versions, devices, and missing packages."),
        "completion": ("litgpt.cli.completion:main", "Print a script that completes commands on Tab."),
    },
    "LitGPT's other names": {
        "generate_full": ("litgpt.commands.generate:main", "Same as generate, for a fully finetuned model."),
        "generate_adapter": ("litgpt.commands.generate:adapter", "Same as generate, for an adapter."),
        "generate_adapter_v2": ("litgpt.commands.generate:adapter_v2", "Same as generate, for an adapter V2."),
        "generate_sequentially": ("litgpt.commands.generate:sequentially", "Same as generate --devices auto."),
        "convert_to_litgpt": ("litgpt.commands.convert:convert_to_litgpt", "Convert a model to LitGPT's format."),
        "convert_from_litgpt": ("litgpt.commands.convert:convert_from_litgpt", "Convert a model from LitGPT's format."),
        "convert_pretrained_checkpoint": (
            "litgpt.commands.convert:convert_pretrained_checkpoint",
            "Extract the weights of a LitGPT pretraining.",
        ),
    },
}
COMMANDS = {name: row for group in GROUPS.values() for name, row in group.items()}
ALIASES = {"finetune": "finetune_lora", "runs": "runs_list", "generate_base": "generate"}
WORDS = {"train": "finetune", "sft": "finetune"}  # of other tools
HANDS_ON = ("verify_resume", "plan")  # commands that take the words of another command as a list
PREFIXES = ("finetune", "data", "tokenizer", "runs")  # first words of the commands that people type as two words
HELP = ("-h", "--help")
SWEEP = ("--sweep", "--sweep_random", "--sweep_budget")  # flags of all finetunes, which `commands/sweep.py` reads
COMPLETE = "__complete"  # hidden: `litgpt __complete WORDS` prints what may follow, for the scripts of `completion`


def spoken(command: str) -> str:
    """A command as people type it: `finetune lora`, `verify-resume`."""
    if command.startswith("verify"):
        return command.replace("_", "-")
    return command.replace("_", " ", 1) if command.startswith(PREFIXES) else command


def usage() -> str:
    groups = "\n".join(f"{title}:\n{rows(group)}" for title, group in GROUPS.items())
    return (
        f"usage: litgpt COMMAND ...\n\nFinetune open language models from a shell.\n\n{groups}\n"
        "A first run:          litgpt finetune lora --config pico/lora\n"
        "Options of a command: litgpt COMMAND -h\n"
    )


def rows(names: dict[str, tuple[str, str]]) -> str:
    width = max(22, *(len(spoken(name)) for name in names))
    return "".join(f"  {spoken(name):{width}} {about}\n" for name, (_, about) in names.items())


def prefix_help(first: str) -> str:
    """The commands that begin with a word, such as `finetune`."""
    names = {name: COMMANDS[name] for name in members(first)}
    alias = ALIASES.get(first)
    default = f"Without a second word, `litgpt {first}` is `litgpt {spoken(alias)}`.\n" if alias else ""
    return (
        f"usage: litgpt {first} {'|'.join(second_words(first))} ...\n\n{rows(names)}\n{default}"
        f"Options of one: litgpt {spoken(next(iter(names)))} -h\n"
    )


def members(first: str) -> list[str]:
    return [name for name in COMMANDS if name.startswith(f"{first}_")]


def second_words(first: str) -> list[str]:
    return [name.removeprefix(f"{first}_") for name in members(first)]


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """The command that a command line begins with, and the other words. Raises `UserError` if there is none."""
    typed, *args = words
    first = WORDS.get(typed, typed)
    # `litgpt finetune lora` means `litgpt finetune_lora`, but `litgpt generate adapter` may name a folder
    is_folder = bool(args) and first in COMMANDS and os.path.isdir(args[0])
    if args and f"{first}_{args[0]}" in (*COMMANDS, *ALIASES) and not is_folder:
        first, args = f"{first}_{args[0]}", args[1:]
    elif args and (hint := misspelled(first, args[0])):
        raise UserError(f"Unknown command '{first} {args[0]}'.{hint} See: litgpt {f'{first} ' * (first in PREFIXES)}-h")
    command = ALIASES.get(first, first.replace("-", "_"))
    if command in COMMANDS:
        return command, args
    if first in PREFIXES:
        second = f"'{first} {args[0]}' is not a command" if args else f"'{first}' is not a command by itself"
        raise UserError(f"{second}. Choose from: {', '.join(map(spoken, members(first)))}. See: litgpt {first} -h")
    near = nearest(first, [*map(spoken, COMMANDS), *ALIASES])
    raise UserError(f"Unknown command {first!r}.{near} See: litgpt -h")


def misspelled(first: str, word: str) -> str:
    """A hint for a misspelled second word of a command, as in `finetune lroa`. The folder of a model gives none."""
    if word.startswith("-") or os.path.exists(word) or os.path.exists(os.path.join("checkpoints", word)):
        return ""
    return nearest(word, second_words(first)).replace("'", f"'{first} ", 1)
