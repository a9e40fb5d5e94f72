"""`litgpt convert_pretrained_checkpoint`"""

import shutil
from pathlib import Path

import torch

from litgpt.checkpoint.find import find_folder
from litgpt.errors import UserError
from litgpt.litgpt_format.folder import MODEL, MODEL_CONFIG, read_pth
from litgpt.storage.outputs import check_replaceable, exclusive, new_folder
from litgpt.text.tokenizer import copy_files


def main(checkpoint_dir: Path, output_dir: Path) -> None:
    """Extract the weights from a LitGPT pretraining checkpoint, which also has the state of the optimizer.

    All commands read LitGPT's checkpoints directly, and the folders of `litgpt pretrain` need no conversion. This makes
    a smaller folder in LitGPT's format.

    Args:
        checkpoint_dir: The folder with lit_model.pth and model_config.yaml.
        output_dir: The output folder, which must be empty or missing.
    """
    folder = find_folder(checkpoint_dir)
    check_replaceable(output_dir, None, [folder], "--output_dir")
    if not (folder / MODEL).is_file():
        raise UserError(f"{folder} has no {MODEL}. It is not a LitGPT checkpoint and needs no conversion.")
    weights = read_pth(folder / MODEL)
    with exclusive(output_dir, "--output_dir"), new_folder(output_dir.resolve()) as target:
        torch.save(weights, target / MODEL)
        copy_files(folder, target)
        for name in (MODEL_CONFIG, "config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    print(f"weights    {len(weights)} tensors, {sum(t.nbytes for t in weights.values()) / 1e9:.2f} GB")
    print(f"written    {output_dir}")
