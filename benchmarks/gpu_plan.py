"""Predict the peak memory of what `gpu.py` measures, without a GPU, as `litgpt plan` does.

    python benchmarks/gpu_plan.py --case packed --method qlora

A step has one micro-batch, as there. A pack counts as one row of its length.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from common import publish
from gpu import CASES, METHODS, OPTIMIZERS, SMOKE
from plan_recipes import Case, predicted

from litgpt.model.config import Config


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="packed")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--model", default="Llama-3.1-8B", help="The name of a known model, for its shape.")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW")
    parser.add_argument("--json", type=Path, help="A file that the line of JSON is added to.")
    args = parser.parse_args(argv)
    shape = CASES[args.case]
    rows, method = str(shape.rows), "full" if args.method == "full" else "lora"
    words = ["finetune", method, "--train.micro_batch_size", rows, "--train.global_batch_size", rows]
    words += ["--precision", args.precision, "--optimizer", args.optimizer]
    words += ["--train.activation_checkpointing", str(shape.checkpointing).lower()]
    words += ["--lora_dropout", "0.05"] if method == "lora" else []
    words += ["--quantize", "bnb.nf4"] if args.method == "qlora" else []
    config = Config(**SMOKE) if args.case == "smoke" else Config.from_name(args.model)
    case = Case(args.case, "", words, args.model, shape.length, "", config=config)
    with tempfile.TemporaryDirectory(prefix="litgpt-gpu-plan-") as folder:
        found = predicted(case, Path(folder))
    publish({"case": args.case, "method": args.method, "predicted_memory": found.peak, "place": found.place}, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
