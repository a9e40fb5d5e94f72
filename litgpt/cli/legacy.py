"""Options of LitGPT, of its older versions, and of other tools that have another name here. Each translation is
reported on stderr.

Options that LitGPT has at the top level (`--max_seq_length`) need no table: `schema.current_name` finds their group.
"""

import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Optional

from litgpt.cli.commands import HELP
from litgpt.errors import UserError, remark

NAMES = {"pretrained_checkpoint_dir": "base"}  # options with the same values and another name
CLASS_NAMES = {"data.mask_inputs": "data.mask_prompt"}  # the same for arguments of a class
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}


def renamed(name: str) -> Callable[[str], list[str]]:
    return lambda value: [f"--{name}", value]


TRAINING = {  # the words of Hugging Face's Trainer, Axolotl, LLaMA-Factory, Unsloth, and mlx-lm
    "--lr": renamed("optimizer.lr"),
    "--batch_size": renamed("train.global_batch_size"),
    "--per_device_train_batch_size": renamed("train.micro_batch_size"),
    "--gradient_accumulation_steps": renamed("train.gradient_accumulation_iters"),
    "--num_train_epochs": renamed("train.epochs"),
    "--num_epochs": renamed("train.epochs"),
    "--warmup_steps": renamed("train.lr_warmup_steps"),
    "--warmup_ratio": renamed("train.lr_warmup_fraction"),
    "--max_length": renamed("train.max_seq_length"),
    "--max_seq_len": renamed("train.max_seq_length"),
    "--sequence_len": renamed("train.max_seq_length"),
    "--max_grad_norm": renamed("train.max_norm"),
    "--output_dir": renamed("out_dir"),
    "--lora_rank": renamed("lora_r"),
}
SWITCHES = {  # words without a value, and what they mean
    "--load_in_4bit": ["--quantize", "bnb.nf4"],
    "--load_in_8bit": ["--quantize", "bnb.int8"],
    "--bf16": ["--precision", "bf16-true"],
    "--gradient_checkpointing": ["--train.activation_checkpointing", "true"],
}
MIXED = {"--bf16": ["--precision", "bf16-mixed"]}  # where all weights are trained: they stay in float32, as elsewhere
VALUES = {  # values of options that have another name here
    "--accelerator": {"gpu": "mps" if sys.platform == "darwin" else "cuda"},
    "--quantize": {name: f"bnb.{name}" for name in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")},
}
FLAGS: dict[str, dict[str, Callable[[str], list[str]]]] = {  # by the beginning of a command: a flag, and its new words
    "validate": {"--dtype": lambda dtype: ["--precision", PRECISIONS.get(dtype, dtype)]},
    "evaluate": {
        "--eval_tasks": lambda tasks: ["--tasks", ",".join(t.strip(" '\"") for t in tasks.strip("[] ").split(","))]
    },
    "finetune": {"--csv_dir": lambda path: ["--data", "JSON", "--data.json_path", path], **TRAINING},
    "pretrain": TRAINING,
    "data": {"--csv_dir": lambda path: ["--data", "JSON", "--data.json_path", path], **TRAINING},
}
REFUSED = {  # by the first word of a command: options without a counterpart, and why they are not needed
    "finetune": {"access_token": "set the environment variable HF_TOKEN, as the result records the command line"},
    "validate": {
        "model_filename": "the folder itself tells which files have the weights",
        "training": "a model is validated as it is used, without dropout",
    },
}
DEFAULTS = {"model_filename": "lit_model.pth"}  # LitGPT's, of options without a counterpart
REFUSED_VALUES = {  # values of options that only LitGPT has
    ("logger_name", "litlogger"): "litlogger is not available. Use csv, tensorboard, wandb, mlflow, or trackio.",
}
MODEL_FILES = ("adapter_config.json", "lit_model.pth.lora", "config.json", "model_config.yaml")  # of a folder
WEIGHTS = (  # endings of files in whose place there are folders now
    ".pth",
    ".pth.lora",
    ".pth.adapter",
    ".pth.adapter_v2",
    ".ckpt",
)
FOLDERS = ("--base", "--out_dir", "--pretrained_checkpoint_dir", "--config")  # paths of merge_lora beside the adapter


def translate(args: list[str], command: str, known: Collection[str]) -> list[str]:
    """A command line in today's words. Raises `UserError` with the reason if an option has no counterpart.

    Args:
        known: The names of the command's options. What it has no option for is left as it is.
    """
    flags = {word.partition("=")[0] for word in args}
    for name, reason in refused_options(command).items():
        if f"--{name}" in flags:
            raise UserError(f"--{name} is not needed: {reason}.")
    if command == "merge_lora":
        return translate_merge(args)
    words, rest = list[str](), list(args)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag
        follows = rest[0] if rest and not rest[0].startswith("--") and rest[0] not in HELP else ""
        has_value = bool(not equals and follows and (name not in SWITCHES or follows.lower() in ("true", "false")))
        value = follows if has_value else value
        if (new := new_words(name, value, command, known)) is None:
            words.append(word)
            continue
        if has_value:
            rest.pop(0)
        if name not in VALUES:
            shown = f"{flag} {shlex.quote(value)}" if value else flag
            remark(f"{shown} is called {' '.join(new)}." if new else f"{shown} is the default.")
        words += new
    return words


def new_words(name: str, value: str, command: str, known: Collection[str]) -> Optional[list[str]]:
    """The words that an option of LitGPT or of another tool stands for; None for today's options."""
    flags = FLAGS.get(command.partition("_")[0], {})
    words: Optional[list[str]] = None
    if name in flags and value:
        words = flags[name](value)
    elif name in SWITCHES and value.lower() in ("", "true", "false"):
        everything = command in ("finetune_full", "pretrain")
        words = {**SWITCHES, **(MIXED if everything else {})}[name]
    elif value in VALUES.get(name, {}):
        words = [name, VALUES[name][value]]
    if words is None or words[0].removeprefix("--").partition(".")[0] not in {name.partition(".")[0] for name in known}:
        return None
    return [] if name in SWITCHES and value.lower() == "false" else words


def translate_merge(args: list[str]) -> list[str]:
    """`merge_lora` with an adapter's folder for its file. Beside `--lora_path`, `--checkpoint_dir` is the base."""
    args, lora = take_flag(args, "--lora_path")
    if lora is not None:
        args, base = take_flag(args, "--checkpoint_dir")
        if base is None and args and not args[0].startswith("-"):
            base, args = args[0], args[1:]
        folder = result_folder(lora)
        remark(f"--lora_path {lora} is called {folder}{f', and its model, {base}, --base {base}' if base else ''}.")
        return [folder, *(["--base", base] if base else []), *args]
    words = []
    for before, word in zip(["", *args], args):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        folder = value if (flag or before) in FOLDERS else result_folder(value)
        if folder != value:
            remark(f"{value} is a folder now, {folder}.")
        words.append(flag + equals + folder)
    return words


def result_folder(path: str) -> str:
    """The folder of a result from the path of a file that it may no longer have; any other path as it is."""
    file = Path(path)
    known = file.name == "lit_model.pth.lora" and file.is_file()
    if known or file.is_dir() or not file.name.endswith(WEIGHTS):
        return path
    places = (file.parent, file.parent / "final")
    return str(next((p for p in places if any((p / name).is_file() for name in MODEL_FILES)), file.parent))


def take_flag(args: list[str], flag: str) -> tuple[list[str], Optional[str]]:
    """The words without a flag, and its value; None without the flag."""
    for i, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name == flag and equals:
            return [*args[:i], *args[i + 1 :]], value
        if name == flag and i + 1 < len(args):
            return [*args[:i], *args[i + 2 :]], args[i + 1]
    return args, None


def refused_options(command: str) -> dict[str, str]:
    return REFUSED.get(command.partition("_")[0], {})


def current_fields(fields: dict[str, Any], command: str, source: str, known: Collection[str]) -> dict[str, Any]:
    """A config in today's words, without options that have no counterpart. Raises `UserError` with the reason for those
    that are set to something else than LitGPT's default."""
    refused = refused_options(command)
    for name in refused.keys() & fields.keys():
        if fields[name] not in (None, False, DEFAULTS.get(name)):
            raise UserError(f"--config {source}: {name} is not needed: {refused[name]}.")
    current: dict[str, Any] = {}
    renamed: dict[str, Any] = {}
    for name, value in fields.items():
        if name in refused:
            continue
        words = None if value is None else new_words(f"--{name}", str(value), command, known)
        if words is None:
            current[name] = value
        else:
            renamed |= {flag.removeprefix("--"): new for flag, new in zip(words[::2], words[1::2])}
    return {**renamed, **current}
