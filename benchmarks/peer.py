"""Measure the same finetune in another program, and print it as the same line of JSON as `train.py`.

    python benchmarks/peer.py litgpt --python PEERS/litgpt/bin/python --model FOLDER --rows ROWS
    python benchmarks/peer.py trl --python PEERS/hf/bin/python --model FOLDER --rows ROWS

LitGPT wants its own model folder (`to_litgpt.py`). ROWS is a folder with train.json and val.json. Real tokens are what
these programs count themselves: LitGPT's "Tokens w/ Prompt", and the tokens that transformers saw without padding.
Seconds are LitGPT's "Training Time", and those between the first and the last step of TRL.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import gigabytes, machine, publish, run
from train import add_run_flags, what

DISTRIBUTIONS = {"litgpt": ("LitGPT", "litgpt"), "trl": ("TRL", "trl")}


def litgpt_command(args: argparse.Namespace, out: Path) -> list[Any]:
    return [
        *(args.python.with_name("litgpt"), f"finetune_{args.method}", args.model, "--out_dir", out),
        *("--data", "JSON", "--data.json_path", args.rows, "--data.num_workers", 0),
        *("--precision", args.precision, "--train.global_batch_size", args.samples),
        *("--train.micro_batch_size", args.micro_batch_size, "--train.max_steps", args.steps),
        *("--train.epochs", args.steps * args.samples, "--train.max_seq_length", args.max_seq_length),
        *("--train.lr_warmup_steps", 1, "--train.log_interval", 1),
        *("--eval.interval", 100000, "--eval.max_iters", 1, "--eval.final_validation", "false"),
    ]


def litgpt_figures(output: str) -> dict[str, Any]:
    """From the table that LitGPT prints after a run.

    Raises:
        SystemExit: it is not there.
    """
    tokens = re.search(r"w/ Prompt\s*:\s*([\d,]+)", output)
    seconds = re.search(r"Training Time\s*:\s*([\d.]+)", output)
    if tokens is None or seconds is None:
        sys.exit(f"{output}\nLitGPT did not print its tokens and its seconds.")
    return {"tokens": int(tokens[1].replace(",", "")), "seconds": float(seconds[1])}


def trl_command(args: argparse.Namespace) -> list[Any]:
    names = ("method", "precision", "samples", "micro_batch_size", "steps", "max_seq_length")
    flags = [word for name in names for word in (f"--{name}", getattr(args, name))]
    script = Path(__file__).with_name("trl_train.py")
    return [args.python, script, "--model", args.model, "--rows", args.rows / "train.json", *flags]


def trl_figures(output: str) -> dict[str, Any]:
    """From the line of JSON that `trl_train.py` ends with."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith('{"tokens"')))


def versions(python: Path, *names: str) -> list[str]:
    """Of packages in another environment."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.split()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=DISTRIBUTIONS)
    parser.add_argument("--python", type=Path, required=True, help="The Python of its virtual environment.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    add_run_flags(parser)
    args = parser.parse_args(argv)
    program, package = DISTRIBUTIONS[args.peer]
    version, torch = versions(args.python, package, "torch")
    with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
        folder = Path(name)
        words = litgpt_command(args, folder / "out") if args.peer == "litgpt" else trl_command(args)
        # TRL would warn once per process that it forks with threads
        measured = run(words, folder / "log", PYTHONPATH="", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    found = litgpt_figures(measured.output) if args.peer == "litgpt" else trl_figures(measured.output)
    speed = found["tokens"] / found["seconds"]
    print(f"{program} {version}: {speed:,.1f} real tokens/s, peak memory {gigabytes(measured.peak_memory)}")
    record = {
        "program": program,
        "version": version,
        **machine(),
        "torch": torch,
        **what(args),
        **found,
        "tokens_per_s": round(speed, 1),
        "peak_memory": measured.peak_memory,
    }
    publish(record, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
