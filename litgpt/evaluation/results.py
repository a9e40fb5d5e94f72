"""The parts of a file of results that do not depend on lm-eval, and where it may be written."""

import os
import re
from pathlib import Path
from typing import Any

import litgpt
from litgpt.errors import UserError
from litgpt.litgpt_format.folder import MODEL_CONFIG
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import CONFIG
from litgpt.storage.files import file_hash
from litgpt.storage.outputs import check_file

SPECIAL = re.compile(r"[\"<>:/|\\?*\[\]]+")  # what lm-eval replaces in the name of a model


def describe(results: dict[str, Any], source: ModelSource, hashes: dict[str, str], seconds: float) -> None:
    """Add to the results which model was evaluated, by name and by hash."""
    name = str(source.folder)
    results |= {"model_source": "litgpt", "model_name": name, "model_name_sanitized": SPECIAL.sub("__", name)}
    dtype = results["config"]["model_dtype"].removeprefix("torch.")
    model_args = {"pretrained": str(source.checkpoint.folder), "dtype": dtype}
    results["config"] |= {"model": "litgpt", "model_args": model_args}
    if source.adapter is not None:
        model_args["peft"] = name
        results["config"]["peft_sha"] = ""
    else:
        hashes = {file: value for file, value in hashes.items() if not file.startswith("adapter_")}
    results["litgpt"] = {"version": litgpt.__version__, "base": str(source.checkpoint.folder), "model_sha256": hashes}
    results["total_evaluation_time_seconds"] = f"{seconds:.2f}"


def model_hashes(source: ModelSource) -> dict[str, str]:
    """SHA-256 hashes of the weight files, the configurations, and the tokenizer."""
    files = [*source.checkpoint.shards(), *(source.checkpoint.folder / n for n in ("config.json", MODEL_CONFIG))]
    if source.adapter is not None:
        files += [source.adapter.file, source.folder / CONFIG]
    found = {file.name: file_hash(file) for file in files if file.is_file()}
    return {**found, "tokenizer": source.tokenizer().fingerprint()}


def check_outputs(file: Path, samples: bool, overwrite: bool) -> None:
    """Raise `UserError` if the results would replace files that litgpt did not write."""
    check_file(file, overwrite, "--out_dir:")
    check_file(file.with_stem(f"{file.stem}_base"), overwrite, "--out_dir:")
    for path in file.parent.glob("samples_*.jsonl") if samples else ():
        check_file(path, overwrite, "--out_dir:")


def writable(folder: Path) -> Path:
    """Create the folder if it does not exist. Raises `UserError` if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out_dir {folder}: {e.strerror}.") from e
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out_dir {folder}: the folder is not writable.")
    return folder
