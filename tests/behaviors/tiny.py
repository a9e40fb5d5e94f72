"""A tiny checkpoint in LitGPT's format. Without litgpt, so that nothing of either program makes it."""

import os
import shutil
from pathlib import Path

import torch
import yaml

FIELDS = {
    "name": "tiny",
    "hf_config": {"org": "me", "name": "tiny"},
    "block_size": 64,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "intermediate_size": 44,
    "padded_vocab_size": 640,
    "vocab_size": 640,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
}
SHAPES = {"norm_1": (32,), "attn.qkv": (64, 32), "attn.proj": (32, 32), "norm_2": (32,)}
SHAPES |= {"mlp.fc_1": (44, 32), "mlp.fc_2": (44, 32), "mlp.proj": (32, 44)}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"lm_head": (640, 32), "transformer.wte": (640, 32), "transformer.ln_f": (32,)}
    shapes |= {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    made = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    return {name: tensor.abs() + 0.9 if tensor.dim() == 1 else tensor for name, tensor in made.items()}


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(weights(), folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(FIELDS))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(os.environ["BEHAVIOR_FOLDER"]) / name, folder / name)
    return folder
