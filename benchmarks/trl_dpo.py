"""DPO with TRL and PEFT, run by `preference.py`. Its last line is JSON: the seconds of the training."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_train import Clock, options


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "precision"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("samples", "micro_batch_size", "steps", "max_seq_length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    dtype = {"bf16-true": torch.bfloat16, "32-true": torch.float32}[args.precision]
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
            args=DPOConfig(**options(args, out), learning_rate=1e-4),
            train_dataset=Dataset.from_list(json.loads(Path(args.rows).read_text(encoding="utf-8"))),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]),
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps({"seconds": round(clock.seconds, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])
