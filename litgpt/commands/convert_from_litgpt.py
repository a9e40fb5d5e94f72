"""`litgpt convert_from_litgpt`"""

import json
import shutil
from pathlib import Path

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import widest_first, write_weights
from litgpt.errors import UserError
from litgpt.litgpt_format.folder import MODEL, LitCheckpoint, lit_adapter_file
from litgpt.storage.outputs import check_replaceable, exclusive, new_folder
from litgpt.text.prompts import STYLE_FILE, checkpoint_template, load_style, save_template
from litgpt.text.tokenizer import Tokenizer, copy_files


def main(checkpoint_dir: Path, output_dir: Path) -> None:
    """Convert a LitGPT model to a Hugging Face folder: config.json, safetensors and the tokenizer files.

    All commands read LitGPT's folders directly; this is for other programs.

    Args:
        checkpoint_dir: The folder with lit_model.pth and model_config.yaml, or the name of one under checkpoints/.
        output_dir: The output folder, which must be empty or missing.
    """
    folder = find_folder(checkpoint_dir)
    check_replaceable(output_dir, None, [folder], "--output_dir")
    if not (folder / MODEL).is_file():
        if lit_adapter_file(folder):
            raise UserError(f"{folder} is an adapter. Only LoRA can become a model: use litgpt merge_lora.")
        raise UserError(f"{folder} has no {MODEL}, so it is not a LitGPT model folder.")
    checkpoint = LitCheckpoint(folder)
    fields, weights = checkpoint.fields, widest_first(map(checkpoint.outline, checkpoint.files))
    with exclusive(output_dir, "--output_dir"), new_folder(output_dir.resolve()) as target:
        write_weights(weights, checkpoint.tensors(w.name for w in weights), target)
        (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        copy_files(folder, target)
        if (folder / STYLE_FILE).is_file():
            shutil.copyfile(folder / STYLE_FILE, target / STYLE_FILE)
            if checkpoint_template(folder) is None:
                tokenizer = Tokenizer(folder)
                save_template(load_style(folder), target, tokenizer.prefix, tokenizer.eos_token or "")
    size = sum(w.size for w in weights) / 1e9
    print(f"model      {checkpoint.config.model_type}, {len(weights)} tensors, {size:.2f} GB")
    print(f"written    {output_dir}")
