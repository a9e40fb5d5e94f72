"""Measure a finetune: real tokens per second, MFU, peak memory, and all of it as a line of JSON.

    python benchmarks/train.py --method lora --precision bf16-true
    python benchmarks/train.py --model checkpoints/ORG/MODEL --data rows.json -- --lora_mlp true

It runs the real command, `litgpt finetune METHOD`, in a process of its own, without validation and examples. Without
--model it trains a random Llama, of 58 million parameters unless flags say otherwise. Real tokens are those of the
rows, prompts and answers, without padding. Seconds are those of the steps, not of loading, tokenizing or saving. MFU is
what the run itself writes (litgpt/train/flops.py): against the model's own products at 1,024 tokens, timed alone in
the same run; and beside it against those of torch's `F.linear`, timed behind the run. Peak memory is the largest
resident set of the process, or on a GPU that of the device. Words after -- go to the command.
"""

import argparse
import csv
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SIZES, add_model_flags, choose_rows, gigabytes, machine, publish, run, write_json

import litgpt
from litgpt.train.flops import plausible
from litgpt.train.progress import percent

METHODS = ("lora", "full", "adapter", "adapter_v2")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--precision", default="bf16-true", help="bf16-true (the default), 32-true, ...")
    parser.add_argument("--samples", type=int, default=8, help="Rows that make an optimizer step (8).")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="Rows that go through the model at once (4).")
    parser.add_argument("--steps", type=int, default=8, help="Optimizer steps (8).")
    parser.add_argument("--max_seq_length", type=int, default=512, help="Tokens of the longest row (512).")
    parser.add_argument("--json", type=Path, help="A file that the line of JSON is added to.")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the words after `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    parser.add_argument("--model", type=Path, help="A Hugging Face folder; by default a random model is made.")
    parser.add_argument("--quantize", help="bnb.nf4, ...: as the command's own flag.")
    parser.add_argument("--activation_checkpointing", action="store_true")
    add_model_flags(parser)
    end = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:end]), argv[end + 1 :]


def over_f_linear(folder: Path, precision: str) -> float:
    """How many times as fast the model's products are as those of torch's `F.linear`, timed alone, here and now."""
    import torch

    from litgpt.checkpoint.folder import Checkpoint
    from litgpt.model.devices import DTYPES, pick_device
    from litgpt.model.gpt import GPT
    from litgpt.train.flops import gemm_throughput

    with torch.device("meta"):
        model = GPT(Checkpoint(folder).config)
    device = pick_device("auto")
    dtype = torch.bfloat16 if precision == "bf16-mixed" else DTYPES[precision]
    theirs = gemm_throughput(model, device, dtype, torch.nn.functional.linear)
    return gemm_throughput(model, device, dtype) / theirs


def command(args: argparse.Namespace, model: Path, rows: Path, out: Path, more: list[str]) -> list[Any]:
    """The finetune as a user types it."""
    quantize = ["--quantize", args.quantize] if args.quantize else []
    return [
        *(sys.executable, "-m", "litgpt", "finetune", args.method, model, "--out_dir", out),
        *("--data", "JSON", "--data.json_path", rows, "--data.val_split_fraction", 0),
        *("--data.prompt_style", "alpaca", "--data.mask_prompt", "false"),
        *("--precision", args.precision, *quantize),
        *("--train.global_batch_size", args.samples, "--train.micro_batch_size", args.micro_batch_size),
        *("--train.max_steps", args.steps, "--train.epochs", args.steps * args.samples, "--train.lr_warmup_steps", 1),
        *("--train.max_seq_length", args.max_seq_length, "--train.save_interval", "null", "--train.log_interval", 1),
        *("--train.activation_checkpointing", str(args.activation_checkpointing).lower()),
        *("--eval.initial_validation", "false", "--eval.final_validation", "false", "--eval.max_new_tokens", "null"),
        *more,
    ]


def figures(metrics: Path) -> dict[str, Any]:
    """Tokens, seconds, speed and MFU of all steps in a `metrics.csv`, and the speed without the first of them."""
    with open(metrics, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["loss"]]
    steps = [{k: float(v or 0) for k, v in row.items()} for row in rows]
    first, last = steps[0], steps[-1]
    ends = [0.0, *(step["seconds"] for step in steps)]
    later = last["seconds"] - first["seconds"]
    known = [(step["mfu"], ends[i + 1] - ends[i]) for i, step in enumerate(steps) if rows[i]["mfu"]]
    timed = sum(seconds for _, seconds in known)
    return {
        "tokens": int(last["tokens"]),
        "seconds": last["seconds"],
        "tokens_per_s": round(last["tokens"] / last["seconds"], 1),
        "tokens_per_s_after_first": round((last["tokens"] - first["tokens"]) / later, 1) if later else None,
        "mfu": round(sum(mfu * seconds for mfu, seconds in known) / timed, 4) if timed else None,
        "device_peak_memory": int(last["peak_memory"]) or None,
    }


def what(args: argparse.Namespace) -> dict[str, Any]:
    """What was run, for the record."""
    names = ("method", "precision", "samples", "micro_batch_size", "steps", "max_seq_length")
    return {name: getattr(args, name) for name in names}


def main(argv: list[str]) -> None:
    args, more = parse(argv)
    with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
        folder = Path(name)
        if args.model is None:
            sizes = [word for name in SIZES for word in (f"--{name}", getattr(args, name))]
            tokenizer = ["--tokenizer", args.tokenizer] if args.tokenizer else []
            run([sys.executable, Path(__file__).with_name("prepare.py"), folder, *sizes, *tokenizer], folder / "log")
        rows = write_json(folder / "rows.json", choose_rows(args.data, args.steps * args.samples))
        words = command(args, args.model or folder / "model", rows, folder / "out", more)
        measured = run(words, folder / "log", LITGPT_CACHE=str(folder / "cache"))
        found = figures(folder / "out" / "metrics.csv")
        of_f_linear = over_f_linear(args.model or folder / "model", args.precision)
        found["mfu_of_f_linear"] = None if found["mfu"] is None else plausible(found["mfu"] * of_f_linear)
    device = re.search(r"\d+ x (cpu|cuda|mps)", measured.output)[1]
    of_device = found.pop("device_peak_memory")
    peak = of_device if device == "cuda" else measured.peak_memory
    record = {
        "program": "this project",
        "version": litgpt.__version__,
        **machine(),
        "device": device,
        "model": str(args.model) if args.model else {name: getattr(args, name) for name in SIZES},
        "rows": str(args.data) if args.data else "random words",
        **what(args),
        "quantize": args.quantize,
        "activation_checkpointing": args.activation_checkpointing,
        "more": more,
        **found,
        "peak_memory": peak,
    }
    print(f"finetune {args.method}, {args.precision}, {args.steps} steps of {args.samples} rows")
    print(f"real tokens/s   {found['tokens_per_s']:,.1f} ({found['tokens']:,} tokens in {found['seconds']:.2f} s)")
    if found["tokens_per_s_after_first"]:
        print(f"without step 1  {found['tokens_per_s_after_first']:,.1f}")
    of_f_linear = percent(found["mfu_of_f_linear"], 1)
    print(f"MFU             {percent(found['mfu'], 1)} (of the products of torch's F.linear: {of_f_linear})")
    print(f"peak memory     {gigabytes(peak)}")
    publish(record, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
