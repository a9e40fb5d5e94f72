"""Measure how long a user waits: for `litgpt -h`, and from a command to its first optimizer step.

    python benchmarks/startup.py --runs 5
    python benchmarks/startup.py --peer benchmarks/.peers/litgpt/bin/python --model MODEL

The finetune is LoRA on the built-in pico, or another small Llama, with 100 rows of JSON; it is timed until the first
line stands in its metrics.csv, tokenizing included, nothing kept from an earlier run. LitGPT, the `litgpt` in another
virtual environment, gets the same weights and rows, and is timed until it prints its first step; `compare.sh` makes
such an environment. All commands take turns, and each time is the median of some runs that follow a first one, which is
not counted: files are in the system's memory then.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine, make_rows, publish, run, write_json

import litgpt
from litgpt.checkpoint.hub import PICO

LENGTH = 256  # tokens of the longest row: such small models take few more
PATIENCE = 300  # seconds after which a program has failed


def until(command: list[Any], log: Path, ready: Callable[[], bool], **environment: str) -> float:
    """Seconds from the start of a command until `ready`. Ends this program if the command fails before or after."""
    words = [str(word) for word in command]
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as f:
        child = subprocess.Popen(words, stdout=f, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        try:
            while not ready() and child.poll() is None and time.perf_counter() - began < PATIENCE:
                time.sleep(0.005)
            seconds = time.perf_counter() - began
            if ready() and child.wait(PATIENCE) == 0:
                return seconds
        finally:
            child.kill()
    sys.exit(f"{log.read_text(encoding='utf-8', errors='replace')}\nfailed: {' '.join(words)}")


def ours_to_first_step(model: Path, folder: Path, rows: Path) -> float:
    metrics = folder / "out" / "metrics.csv"
    command = [
        *(sys.executable, "-m", "litgpt", "finetune", "lora", model, "--out_dir", folder / "out"),
        *("--data", "JSON", "--data.json_path", rows / "train.json", "--data.val_split_fraction", 0),
        *("--eval.initial_validation", "false", "--eval.max_new_tokens", "null", "--train.max_steps", 1),
        *("--train.lr_warmup_steps", 0, "--train.max_seq_length", LENGTH),
    ]

    def ready() -> bool:
        return metrics.is_file() and metrics.read_text(encoding="utf-8").count("\n") > 1

    return until(command, folder / "log", ready, LITGPT_CACHE=str(folder / "cache"))


def peers_to_first_step(peer: Path, model: Path, folder: Path, rows: Path) -> float:
    log = folder / "log"
    command = [
        *(peer, "finetune_lora", model, "--out_dir", folder / "out", "--data", "JSON", "--data.json_path", rows),
        *("--train.max_steps", 2, "--train.lr_warmup_steps", 1, "--train.log_interval", 1),
        *("--train.max_seq_length", LENGTH, "--eval.max_iters", 1, "--eval.final_validation", "false"),
    ]

    def ready() -> bool:
        return log.is_file() and "(step)" in log.read_text(encoding="utf-8", errors="replace")

    return until(command, log, ready, PYTHONPATH="", PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")


def medians(commands: dict[str, Callable[[Path], float]], runs: int) -> dict[str, float]:
    """Of `runs` rounds, in which each command runs once in an empty folder, after a round that is not counted."""
    seconds: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(runs + 1):
        for what, measure in commands.items():
            with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
                seconds[what].append(measure(Path(name)))
    return {what: statistics.median(all_of_it[1:]) for what, all_of_it in seconds.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="Of each command, after one that is not counted (5).")
    parser.add_argument("--model", type=Path, default=PICO, help="The folder of a small Llama (the built-in pico).")
    parser.add_argument("--peer", type=Path, help="The Python of the virtual environment of LitGPT.")
    parser.add_argument("--json", type=Path, help="A file that the line of JSON is added to.")
    args = parser.parse_args(argv)
    model = args.model.resolve()
    with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
        shared = Path(name)
        rows = shared / "rows"
        for part, n in (("train", 100), ("val", 4)):
            write_json(rows / f"{part}.json", make_rows(n))
        help_of_ours = [sys.executable, "-m", "litgpt", "-h"]
        commands = {
            "help_s": lambda folder: run(help_of_ours, folder / "log").seconds,
            "first_step_s": lambda folder: ours_to_first_step(model, folder, rows),
        }
        if args.peer is not None:
            converted = shared / "model"
            run([args.peer, Path(__file__).with_name("to_litgpt.py"), model, converted], shared / "log", PYTHONPATH="")
            peer = args.peer.with_name("litgpt")
            commands |= {
                "peer_help_s": lambda folder: run([peer, "-h"], folder / "log", PYTHONPATH="").seconds,
                "peer_first_step_s": lambda folder: peers_to_first_step(peer, converted, folder, rows),
            }
        found = medians(commands, args.runs)
    for what, seconds in found.items():
        print(f"{what:18} {seconds:6.2f}")
    rounded = {what: round(seconds, 3) for what, seconds in found.items()}
    publish({"version": litgpt.__version__, **machine(), "model": model.name, "runs": args.runs, **rounded}, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
