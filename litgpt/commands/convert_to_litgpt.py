"""`litgpt convert_to_litgpt`"""

import os
from pathlib import Path
from typing import Literal, Optional

import torch
import yaml

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import Checkpoint
from litgpt.checkpoint.hub import repository_id
from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.litgpt_format.folder import MODEL, MODEL_CONFIG, to_lit
from litgpt.model.config import Config, to_litgpt
from litgpt.storage.outputs import check_file, put_single, write_single

LITGPT_NAMES = {  # by family, how the names begin by which LitGPT knows it
    "gemma": "Gemma-",
    "gemma2": "Gemma-2-",
    "gemma3": "Gemma-3-",
    "gemma3_text": "Gemma-3-",
    "phi": "phi-",
    "phi3": "Phi-3-",
    "qwen2": "Qwen2.5-",
    "qwen3": "Qwen3-",
    "qwen3_moe": "Qwen3-",
    "olmo": "OLMo-",
    "olmo2": "OLMo-2-",
}


def main(
    checkpoint_dir: Path,
    model_name: Optional[str] = None,
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
    debug_mode: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model in LitGPT's form too: lit_model.pth and model_config.yaml, into its own folder.

    No command here needs that; it is for LitGPT.

    Args:
        checkpoint_dir: The Hugging Face folder of a model, or the name of one under checkpoints/.
        model_name: The name in model_config.yaml, by which LitGPT chooses some of a model's math; by default the
            folder's, with the family's before it where LitGPT would not know it otherwise.
        dtype: The type of the weights; by default that of the folder.
        debug_mode: Show each tensor as it is converted.
        overwrite: Replace files of these names that litgpt did not write.
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
    if left_out := [n for n in checkpoint.files if kept.search(n)]:
        print(f"left out   {len(left_out)} tensors of a part that LitGPT does not have, like {left_out[0]}")
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
    """The folder's name, if LitGPT knows the family by it; else with the family's before it."""
    if config.model_type == "falcon" and "falcon" not in folder:
        return f"falcon-{'7b' if config.shared_attention_norm else '40b'}-{folder}"
    begin = LITGPT_NAMES.get(config.model_type, "")
    return folder if folder.lower().startswith(begin.lower()) and begin.rstrip("-") in folder else begin + folder
