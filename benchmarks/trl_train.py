"""A finetune with TRL, run by `peer.py` with TRL's own Python. Its last line is JSON: real tokens and seconds.

TRL has no Alpaca style, so that the rows are rendered here, as the other programs render them.
"""

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
PLAIN = f"{TASK}. {REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
INPUT = (
    f"{TASK}, paired with an input that provides further context. {REQUEST}\n\n### Instruction:\n{{instruction}}\n\n"
    "### Input:\n{input}\n\n### Response:\n"
)


class Clock(TrainerCallback):
    """Times the training alone."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def options(args: argparse.Namespace, out: str) -> dict[str, Any]:
    """What trainers of TRL have in common here."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.samples // args.micro_batch_size,
        "max_steps": args.steps,
        "max_length": args.max_seq_length,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # no autocast: the weights themselves are bfloat16 where that is asked for
        "gradient_checkpointing": False,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "method", "precision"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("samples", "micro_batch_size", "steps", "max_seq_length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args(argv)
    with open(args.rows, encoding="utf-8") as f:
        rows = json.load(f)
    data = Dataset.from_list([{"text": (INPUT if r["input"] else PLAIN).format(**r) + r["output"]} for r in rows])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    dtype = {"bf16-true": torch.bfloat16, "32-true": torch.float32}[args.precision]
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
            args=SFTConfig(
                **options(args, out),
                packing=False,
                learning_rate=1e-3,
                warmup_steps=1,
                include_num_input_tokens_seen="non_padding",
            ),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora if args.method == "lora" else None,
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps({"tokens": int(trainer.state.num_input_tokens_seen), "seconds": round(clock.seconds, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])
