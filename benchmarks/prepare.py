"""Make what a benchmark trains: a random Llama in OUT/model, and rows in OUT/rows (train.json and a few in val.json).

    python benchmarks/prepare.py OUT --n_rows 64 --vocab 32000 --tokenizer checkpoints/ORG/MODEL --data rows.json

A program of its own, so that its memory is not counted with that of the programs that are measured.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import add_model_flags, choose_rows, write_json

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import write_model
from litgpt.model.gpt import GPT
from litgpt.train.base_model import BaseModel

N_VAL = 4  # LitGPT wants some


def write_random_model(folder: Path, args: argparse.Namespace) -> None:
    """A Llama in float32, as a Hugging Face folder. Its vocabulary may be larger than the tokenizer's."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab,
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "intermediate_size": args.mlp,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    start = BaseModel.random(fields, find_folder(args.tokenizer or Path("pico")))
    with torch.device("meta"):
        model = GPT(start.config)
    torch.manual_seed(0)
    start.fill(model, torch.float32, torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    write_model(model, start.fields, folder)
    start.copy_tokenizer(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n_rows", type=int, default=64, help="Rows to train on (64).")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    rows = choose_rows(args.data, args.n_rows + N_VAL)
    write_json(args.out / "rows" / "train.json", rows[: args.n_rows])
    write_json(args.out / "rows" / "val.json", rows[args.n_rows :])
    write_random_model(args.out / "model", args)


if __name__ == "__main__":
    main(sys.argv[1:])
