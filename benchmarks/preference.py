"""Measure DPO with LoRA: real tokens per second beside TRL, and peak memory beside supervised LoRA on the same tokens.

    python benchmarks/preference.py --rounds 3
    python benchmarks/preference.py --model checkpoints/ORG/MODEL --precision 32-true --peer none

The programs take turns, each in a process of its own. Pairs are random words: a prompt and two answers. Seconds are
those of the steps and, of litgpt, of the reference pass before them; TRL runs its reference model in each step.
Tokens are those of both sequences of a pair, without padding. The supervised run has a row for each sequence.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SIZES, add_model_flags, gigabytes, machine, make_rows, publish, run, write_json
from train import figures

CLOCK = """
import atexit, sys, time
from litgpt.train import objectives
compute, seconds = objectives.compute_reference, [0.0]
def timed(*args):
    began = time.perf_counter()
    compute(*args)
    seconds[0] += time.perf_counter() - began
objectives.compute_reference = timed
atexit.register(lambda: print("reference", seconds[0]))
from litgpt.__main__ import main
main(sys.argv[1:])
"""


def ours(args: argparse.Namespace, name: str, model: Path, rows: Path, samples: int, folder: Path) -> dict[str, Any]:
    """A finetune with the real command; `samples` rows make a step."""
    out, micro = folder / name, args.micro_batch_size * (samples // args.samples)
    words = [
        *(sys.executable, "-c", CLOCK, "finetune", name, model, rows, "--out_dir", out, "--overwrite", "true"),
        *("--data.val_split_fraction", 0, "--data.prompt_style", "none", "--data.mask_prompt", "true"),
        *("--precision", args.precision, "--lora_dropout", 0, "--train.epochs", 99, "--train.max_steps", args.steps),
        *("--train.global_batch_size", samples, "--train.micro_batch_size", micro),
        *("--train.max_seq_length", args.max_seq_length, "--train.save_interval", "null"),
        *("--eval.initial_validation", "false", "--eval.final_validation", "false", "--eval.max_new_tokens", "null"),
    ]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        measured = run(words, folder / "log", LITGPT_CACHE=cache)
    found = figures(out / "metrics.csv")
    reference = float(measured.output.rpartition("reference ")[2])
    seconds = found["seconds"] + reference
    return {
        "program": f"this project, {name}",
        "tokens": found["tokens"],
        "seconds": round(seconds, 3),
        "reference_seconds": round(reference, 3),
        "tokens_per_s": round(found["tokens"] / seconds, 1),
        "peak_memory": measured.peak_memory,
    }


def trl(args: argparse.Namespace, model: Path, rows: Path, tokens: int, folder: Path) -> dict[str, Any]:
    names = ("precision", "samples", "micro_batch_size", "steps", "max_seq_length")
    flags = [word for name in names for word in (f"--{name}", getattr(args, name))]
    script = Path(__file__).with_name("trl_dpo.py")
    measured = run([sys.executable, script, "--model", model, "--rows", rows, *flags], folder / "log")
    seconds = json.loads(measured.output.strip().splitlines()[-1])["seconds"]
    return {
        "program": "TRL, dpo",
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_memory": measured.peak_memory,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--samples", type=int, default=8, help="Pairs that make an optimizer step (8).")
    parser.add_argument("--micro_batch_size", type=int, default=2, help="Pairs that go through the model at once (2).")
    parser.add_argument("--steps", type=int, default=6, help="Optimizer steps (6).")
    parser.add_argument("--max_seq_length", type=int, default=512, help="Tokens of the longest sequence (512).")
    parser.add_argument("--rounds", type=int, default=1, help="Rounds of all programs (1); medians are compared.")
    parser.add_argument("--peer", choices=("trl", "none"), default="trl")
    parser.add_argument("--model", type=Path, help="A Hugging Face folder; by default a random model is made.")
    parser.add_argument("--json", type=Path, help="A file that the lines of JSON are added to.")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
        folder = Path(name)
        if args.model is None:
            sizes = [word for size in SIZES for word in (f"--{size}", getattr(args, size))]
            tokenizer = ["--tokenizer", args.tokenizer] if args.tokenizer else []
            run([sys.executable, Path(__file__).with_name("prepare.py"), folder, *sizes, *tokenizer], folder / "log")
        model = args.model or folder / "model"
        chosen, rejected = (make_rows(args.samples * args.steps, seed) for seed in (0, 1))
        pairs = [
            {"prompt": f"{a['instruction']} {a['input']}", "chosen": f" {a['output']}", "rejected": f" {b['output']}"}
            for a, b in zip(chosen, rejected)
        ]
        rows = [{"prompt": p["prompt"], "completion": p[side]} for p in pairs for side in ("chosen", "rejected")]
        pairs_file, rows_file = write_json(folder / "pairs.json", pairs), write_json(folder / "rows.json", rows)
        results: dict[str, list[dict[str, Any]]] = {"dpo": [], "lora": [], "trl": []}
        for _ in range(args.rounds):
            results["dpo"].append(ours(args, "dpo", model, pairs_file, args.samples, folder))
            results["lora"].append(ours(args, "lora", model, rows_file, 2 * args.samples, folder))
            if args.peer == "trl":
                results["trl"].append(trl(args, model, pairs_file, results["dpo"][-1]["tokens"], folder))
    settings = {name: getattr(args, name) for name in ("precision", "samples", "micro_batch_size", "steps", "rounds")}
    speed, memory = {}, {}
    for name, found in results.items():
        for record in found:
            publish({**machine(), **settings, **record}, args.json)
        if found:
            speed[name] = statistics.median(record["tokens_per_s"] for record in found)
            memory[name] = statistics.median(record["peak_memory"] or 0 for record in found)
            print(f"{name:5} {speed[name]:9,.1f} tokens/s   {gigabytes(memory[name])}")
    print(f"memory of dpo / lora  {memory['dpo'] / memory['lora']:.3f}")
    if "trl" in speed:
        print(f"speed of dpo / TRL    {speed['dpo'] / speed['trl']:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
