"""`litgpt convert_to_litgpt`, `convert_from_litgpt` and `convert_pretrained_checkpoint`"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import yaml

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import Checkpoint, widest_first, write_weights
from litgpt.checkpoint.hub import repository_id
from litgpt.commands.merge_lora import merged_folder
from litgpt.errors import UserError, remark
from litgpt.families import weight_map
from litgpt.families.weights import Weights
from litgpt.litgpt_format.folder import (
    MODEL,
    MODEL_CONFIG,
    LitCheckpoint,
    has_hf_weights,
    lit_adapter_file,
    read_pth,
    to_lit,
)
from litgpt.methods.adapter_folder import is_adapter
from litgpt.model.config import Config, to_litgpt
from litgpt.storage.outputs import check_file, check_replaceable, exclusive, new_folder, put_single, write_single
from litgpt.text.prompts import STYLE_FILE, checkpoint_template, load_style, save_template
from litgpt.text.styles import STYLES
from litgpt.text.tokenizer import Tokenizer, copy_files, save_stops

MODEL_PTH = "model.pth"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
LITGPT_NAMES = {  # by family, the prefix of its names in LitGPT
    "gemma": "Gemma-",
    "gemma2": "Gemma-2-",
    "gemma3": "Gemma-3-",
    "gemma3_text": "Gemma-3-",
    "phi": "phi-",
    "phi3": "Phi-3-",
    "qwen2": "Qwen2.5-",
    "qwen2_5_vl": "Qwen2.5-",
    "qwen3": "Qwen3-",
    "qwen3_vl": "Qwen3-",
    "qwen3_moe": "Qwen3-",
    "olmo": "OLMo-",
    "olmo2": "OLMo-2-",
}


def convert_to_litgpt(
    checkpoint_dir: Path,
    model_name: Optional[str] = None,
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
    debug_mode: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a model to LitGPT's format: adds lit_model.pth and model_config.yaml to its folder.

    Only LitGPT needs these files.

    Args:
        checkpoint_dir: The Hugging Face folder of a model, or the name of one under checkpoints/.
        model_name: The name in model_config.yaml, from which LitGPT derives some of the architecture. Default: the name
            of the folder, with a prefix for its family if LitGPT needs one.
        dtype: The type of the weights. Default: that of the folder.
        debug_mode: Print each tensor as it is converted.
        overwrite: Replace files with these names that litgpt did not write.
    """
    folder = find_folder(checkpoint_dir)
    for file in (MODEL, MODEL_CONFIG):
        check_file(folder / file, overwrite, "checkpoint_dir:")
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    config.repo_id = repository_id(folder) or ""
    name = model_name or lit_name(config, folder.resolve().name)
    try:
        numbers = to_litgpt(config, name)
    except UserError as e:
        raise UserError(f"{folder}: {e}") from e
    weights = {}
    for theirs, tensor in to_lit(checkpoint):
        weights[theirs] = tensor if dtype is None else tensor.to(getattr(torch, dtype))
        if debug_mode:
            print(f"{theirs} {tuple(tensor.shape)} {weights[theirs].dtype}")
    kept = weight_map(config).kept
    if skipped := [n for n in checkpoint.files if kept.search(n)]:
        print(f"skipped    {len(skipped)} tensors of a part that LitGPT does not have, such as {skipped[0]}")
    temporary = folder / f".{MODEL}.tmp"
    try:
        torch.save(weights, temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        put_single(temporary, folder / MODEL)
    finally:
        temporary.unlink(missing_ok=True)
    write_single(folder / MODEL_CONFIG, yaml.safe_dump(numbers))
    print(f"model      {name}, {len(weights)} tensors, {sum(t.nbytes for t in weights.values()) / 1e9:.2f} GB")
    print(f"written    {folder / MODEL}, {folder / MODEL_CONFIG}")


def lit_name(config: Config, folder: str) -> str:
    """The name of the folder, with the prefix that LitGPT needs to recognize the family."""
    if config.model_type == "falcon" and "falcon" not in folder:
        return f"falcon-{'7b' if config.shared_attention_norm else '40b'}-{folder}"
    begin = LITGPT_NAMES.get(config.model_type, "")
    return folder if folder.lower().startswith(begin.lower()) and begin.rstrip("-") in folder else begin + folder


def convert_from_litgpt(checkpoint_dir: Path, output_dir: Path, model_pth: bool = True) -> None:
    """Convert a LitGPT model to a Hugging Face folder: config.json, safetensors and the tokenizer files.

    All commands read LitGPT's folders directly; this is for other programs. A folder that is already a Hugging Face
    folder is copied. For a LoRA that is merged, its merged model is used.

    Args:
        checkpoint_dir: The folder with lit_model.pth and model_config.yaml, or the name of one under checkpoints/.
        output_dir: The output folder, which must be empty or missing.
        model_pth: Also write model.pth, which has the weights under their Hugging Face names for torch.load.
    """
    folder = find_folder(checkpoint_dir)
    if not (folder / MODEL).is_file():
        folder = hf_folder(folder)
    check_replaceable(output_dir, None, [folder], "--output_dir")
    checkpoint: Weights = LitCheckpoint(folder) if (folder / MODEL).is_file() else Checkpoint(folder)
    fields, weights = checkpoint.fields, widest_first(map(checkpoint.outline, checkpoint.files))
    with exclusive(output_dir, "--output_dir"), new_folder(output_dir.resolve()) as target:
        write_weights(weights, checkpoint.tensors(w.name for w in weights), target, checkpoint.config)
        if model_pth:
            torch.save(dict(checkpoint.tensors(w.name for w in weights)), target / MODEL_PTH)
        (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        copy_files(folder, target)
        copy_style(folder, target, fields)
    size = sum(w.size for w in weights) / 1e9
    print(f"model      {checkpoint.config.model_type}, {len(weights)} tensors, {size:.2f} GB")
    print(f"written    {output_dir}")


def hf_folder(folder: Path) -> Path:
    """A folder that is already in Hugging Face's form, or the merged model beside a LoRA. Raises `UserError` if it is
    neither."""
    if lit_adapter_file(folder) or is_adapter(folder):
        merged = merged_folder(folder)
        if merged is None:
            raise UserError(f"{folder} is an adapter. Merge it first: litgpt merge_lora {folder}")
        remark(f"{folder} is an adapter. Using its merged model, {merged}.")
        return merged
    if not has_hf_weights(folder):
        raise UserError(f"{folder} has no {MODEL}, so it is not a LitGPT model folder.")
    remark(f"{folder} is already a Hugging Face folder, which needs no conversion. It is copied.")
    return folder


def copy_style(folder: Path, target: Path, fields: dict[str, Any]) -> None:
    """Copy the prompt style of a folder. Without a chat template, it becomes one, if there is a tokenizer. `fields` is
    the `config.json` of the model."""
    if (folder / STYLE_FILE).is_file():
        shutil.copyfile(folder / STYLE_FILE, target / STYLE_FILE)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    if has_tokenizer and checkpoint_template(folder) is None and (style := load_style(folder)) is not STYLES["none"]:
        tokenizer = Tokenizer(folder)
        save_template(style, target, tokenizer)
        save_stops(target, tokenizer, style, fields)


def convert_pretrained_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Extract the weights from a LitGPT pretraining checkpoint, which also has the state of the optimizer.

    All commands read LitGPT's checkpoints directly, and the folders of `litgpt pretrain` need no conversion: they are
    copied. This makes a smaller folder in LitGPT's format.

    Args:
        checkpoint_dir: The folder with lit_model.pth and model_config.yaml.
        output_dir: The output folder, which must be empty or missing.
    """
    folder = find_folder(checkpoint_dir)
    if not (folder / MODEL).is_file():
        convert_from_litgpt(folder, output_dir, model_pth=False)
        return
    check_replaceable(output_dir, None, [folder], "--output_dir")
    weights = read_pth(folder / MODEL)
    with exclusive(output_dir, "--output_dir"), new_folder(output_dir.resolve()) as target:
        torch.save(weights, target / MODEL)
        copy_files(folder, target)
        for name in (MODEL_CONFIG, "config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    print(f"weights    {len(weights)} tensors, {sum(t.nbytes for t in weights.values()) / 1e9:.2f} GB")
    print(f"written    {output_dir}")
