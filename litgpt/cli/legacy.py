"""What people typed for LitGPT, and what it is called here. Each translation is said, with the name of today.

Options that older recipes have at the top level (`--max_seq_length`) are found by `cli.new_home` without a table.
"""

import sys
from pathlib import Path
from typing import Any, Optional

from litgpt.errors import UserError

NAMES = {"pretrained_checkpoint_dir": "base"}  # where an option is only called otherwise
TOKEN = "put the token into the environment variable HF_TOKEN, since the command line is recorded with the result"
REFUSED = {  # by the first word of a command: options that have no counterpart, and why
    "finetune": {"access_token": TOKEN},
    "validate": {
        "model_filename": "which files hold the weights is found out from the folder",
        "training": "a folder is validated as it is used, without dropout",
    },
}
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}
ADAPTER_FILES = ("adapter_config.json", "lit_model.pth.lora")
WEIGHTS = (".pth", ".pth.lora", ".ckpt")  # endings of files that are folders now
FOLDERS = ("--base", "--out_dir", "--pretrained_checkpoint_dir", "--config")  # of merge_lora, beside the adapter


def translate(args: list[str], command: str) -> list[str]:
    """The words of a command line with those of LitGPT's past exchanged.

    Raises:
        UserError: one of them has no counterpart; the reason is in the message.
    """
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, reason in refusals(command).items():
        if f"--{name}" in words:
            raise UserError(f"--{name} is not needed: {reason}.")
    if command == "merge_lora":
        return merge_words(args)
    if command == "validate":
        args, dtype = taken(args, "--dtype")
        if dtype is not None:
            say(f"--dtype {dtype} is called --precision {PRECISIONS.get(dtype, dtype)}")
            return [*args, "--precision", PRECISIONS.get(dtype, dtype)]
    if command == "evaluate":
        args, tasks = taken(args, "--eval_tasks")
        if tasks is not None:
            names = ",".join(name.strip(" '\"") for name in tasks.strip("[] ").split(","))
            say(f"--eval_tasks {tasks!r} is called --tasks {names}")
            return [*args, "--tasks", names]
    if command.startswith(("finetune", "data_check")):
        args, rows = taken(args, "--csv_dir")
        if rows is not None:
            say(f"--csv_dir {rows} is called --data JSON --data.json_path {rows}")
            named = any(word.partition("=")[0] == "--data" for word in args)
            return [*args, *([] if named else ["--data", "JSON"]), "--data.json_path", rows]
    return args


def merge_words(args: list[str]) -> list[str]:
    """Of `merge_lora`: the file of an adapter stands for its folder; with `--lora_path` for it, `--checkpoint_dir` was
    the base."""
    args, lora = taken(args, "--lora_path")
    if lora is not None:
        args, base = taken(args, "--checkpoint_dir")
        if base is None and args and not args[0].startswith("-"):
            base, args = args[0], args[1:]
        folder = adapter_folder(lora)
        say(f"--lora_path {lora} is called {folder}" + (f", and its model, {base}, --base {base}" if base else ""))
        return [folder, *(["--base", base] if base else []), *args]
    words = []
    for before, word in zip(["", *args], args):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        folder = value if (flag or before) in FOLDERS else adapter_folder(value)
        if folder != value:
            say(f"{value} is a folder now, {folder}")
        words.append(flag + equals + folder)
    return words


def adapter_folder(path: str) -> str:
    """The folder of an adapter from the path of a file that it may no longer have; anything else as it is."""
    file = Path(path)
    known = file.name == ADAPTER_FILES[1] and file.is_file()
    if known or file.is_dir() or not file.name.endswith(WEIGHTS):
        return path
    places = (file.parent, file.parent / "final")
    return str(next((p for p in places if any((p / name).is_file() for name in ADAPTER_FILES)), file.parent))


def taken(args: list[str], flag: str) -> tuple[list[str], Optional[str]]:
    """The words without a flag, and its value; None if it is not there."""
    for i, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name == flag and equals:
            return [*args[:i], *args[i + 1 :]], value
        if name == flag and i + 1 < len(args):
            return [*args[:i], *args[i + 2 :]], args[i + 1]
    return args, None


def refusals(command: str) -> dict[str, str]:
    return REFUSED.get(command.partition("_")[0], {})


def without_refused(fields: dict[str, Any], command: str, source: str) -> dict[str, Any]:
    """What a config holds, without options that have no counterpart and that are off in it.

    Raises:
        UserError: such an option is on; the reason is in the message.
    """
    refused = refusals(command)
    for name in refused.keys() & fields.keys():
        if fields[name] not in (None, False):
            raise UserError(f"--config {source}: {name} is not needed: {refused[name]}.")
    return {name: value for name, value in fields.items() if name not in refused}


def say(text: str) -> None:
    print(f"litgpt: {text}.", file=sys.stderr)
