"""Measure how long a user waits: for `litgpt -h`, and from a command to its first optimizer step.

    python benchmarks/startup.py --runs 5
    python benchmarks/startup.py --peer benchmarks/.peers/litgpt/bin/python

The finetune is LoRA on the built-in pico with 100 rows of JSON; it is timed until the first line stands in its
metrics.csv, tokenizing included, nothing kept from an earlier run. LitGPT, the `litgpt` in another virtual environment,
gets the same weights and rows, and is timed until it prints its first step; `compare.sh` makes such an environment.
Each time is the median of some runs that follow a first one, which is not counted: files are in the system's memory
then.
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
from litgpt.hub import PICO

LENGTH = 256  # tokens of the longest row: pico takes no more
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


def ours_to_first_step(folder: Path, rows: Path) -> float:
    metrics = folder / "out" / "metrics.csv"
    command = [
        *(sys.executable, "-m", "litgpt", "finetune", "lora", "pico", "--out_dir", folder / "out"),
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


def median(measure: Callable[[Path], float], runs: int) -> float:
    """Of `runs` measurements, each in an empty folder, after one that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
            seconds.append(measure(Path(name)))
    return statistics.median(seconds[1:])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="Of each command, after one that is not counted (5).")
    parser.add_argument("--peer", type=Path, help="The Python of the virtual environment of LitGPT.")
    parser.add_argument("--json", type=Path, help="A file that the line of JSON is added to.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
        shared = Path(name)
        rows = shared / "rows"
        for part, n in (("train", 100), ("val", 4)):
            write_json(rows / f"{part}.json", make_rows(n))
        ours = [sys.executable, "-m", "litgpt", "-h"]
        found = {
            "help_s": median(lambda folder: run(ours, folder / "log").seconds, args.runs),
            "first_step_s": median(lambda folder: ours_to_first_step(folder, rows), args.runs),
        }
        if args.peer is not None:
            model = shared / "model"
            run([args.peer, Path(__file__).with_name("to_litgpt.py"), PICO, model], shared / "log", PYTHONPATH="")
            litgpt_of_peer = args.peer.with_name("litgpt")
            help_of_peer = [litgpt_of_peer, "-h"]
            found["peer_help_s"] = median(lambda f: run(help_of_peer, f / "log", PYTHONPATH="").seconds, args.runs)
            found["peer_first_step_s"] = median(
                lambda folder: peers_to_first_step(litgpt_of_peer, model, folder, rows), args.runs
            )
    for what, seconds in found.items():
        print(f"{what:18} {seconds:6.2f}")
    rounded = {what: round(seconds, 3) for what, seconds in found.items()}
    publish({"version": litgpt.__version__, **machine(), "runs": args.runs, **rounded}, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
