"""Write a Hugging Face Llama as LitGPT's folder, with LitGPT's own code and Python: to_litgpt.py HF_FOLDER OUT"""

import json
import shutil
import sys
from pathlib import Path

import torch
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
from safetensors.torch import load_file

from litgpt.model.config import Config


def main(source: Path, out: Path) -> None:
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    config = Config.from_name(
        "Llama-2-7b-hf",
        n_layer=fields["num_hidden_layers"],
        n_embd=width,
        n_head=heads,
        n_query_groups=fields["num_key_value_heads"],
        head_size=fields.get("head_dim") or width // heads,
        intermediate_size=fields["intermediate_size"],
        block_size=fields["max_position_embeddings"],
        padded_vocab_size=fields["vocab_size"],
        norm_eps=fields["rms_norm_eps"],
    )
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(source / "model.safetensors"))
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])  # of a tied model
    out.mkdir(parents=True, exist_ok=True)
    torch.save(weights, out / "lit_model.pth")
    save_config(config, out)
    for file in source.iterdir():
        if file.suffix in (".json", ".model"):
            shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
