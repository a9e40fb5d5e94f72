"""Compare the default learning rate with rates around it, by the validation loss of short finetunes.

    python benchmarks/learning_rates.py --data rows.json --models pico --methods lora full --out out/rates
    python benchmarks/learning_rates.py --data rows.json --models pico --methods lora --out out/rates -- --lora_mlp true

For each model and method, it runs `litgpt finetune METHOD` at the default rate times 1/9, 1/3, 1, 3, and 9, once per
seed, which sets the initial weights, the row order, and dropout. The rows are those of an Alpaca file (JSON), shuffled
once, without duplicates; all runs train and validate on the same ones. The warmup is a tenth of the run. Words after --
go to the command, which uses its own defaults otherwise. A run that diverges has an infinite loss.

The result of each run is a line of OUT/runs.csv; runs that are already there are not repeated. The table has the mean
validation losses at the end of the runs, and how far the default rate is above the best.
"""

import argparse
import csv
import itertools
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Optional

from common import write_json

from litgpt.__main__ import main as litgpt
from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import Checkpoint
from litgpt.train.learning_rate import RULES, default_learning_rate

SETTINGS = "model hidden method data rows val_rows epochs max_seq_length more lr seed".split()
RESULTS = "steps tokens before loss seconds".split()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pico"], help="Folders or names of models (pico).")
    parser.add_argument("--methods", nargs="+", choices=RULES, default=["lora", "full"])
    parser.add_argument("--data", type=Path, required=True, help="An Alpaca file (JSON).")
    parser.add_argument("--rows", type=int, default=320, help="Training rows (320).")
    parser.add_argument("--val_rows", type=int, default=96, help="Validation rows (96).")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--max_seq_length", type=int, default=256, help="Tokens of the longest row (256).")
    parser.add_argument("--exponents", type=int, nargs="+", default=[-2, -1, 0, 1, 2], help="Of 3, times the default.")
    parser.add_argument("--rate", type=float, help="The rate in the middle, instead of the default.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/rates"), help="Folder for the results (out/rates).")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.more = argv[end + 1 :]
    return args


def write_rows(args: argparse.Namespace) -> Path:
    """A folder with train.json and val.json."""
    rows = json.loads(args.data.read_text(encoding="utf-8"))
    rows = list({(row["instruction"], row.get("input")): row for row in rows}.values())
    if len(rows) < args.rows + args.val_rows:
        sys.exit(f"{args.data} has only {len(rows)} different rows.")
    random.Random(0).shuffle(rows)
    folder = args.out / "rows" / f"{args.data.stem}-{args.rows}-{args.val_rows}"
    write_json(folder / "val.json", rows[: args.val_rows])
    write_json(folder / "train.json", rows[args.val_rows : args.val_rows + args.rows])
    return folder


def command(settings: dict[str, Any], model: Path, rows: Path, out: Path, more: list[str]) -> list[Any]:
    return [
        *("finetune", settings["method"], model, "--out_dir", out, "--overwrite", "true", "--seed", settings["seed"]),
        *("--data", "JSON", "--data.json_path", rows / "train.json", "--data.val_path", rows / "val.json"),
        *("--optimizer.lr", settings["lr"], "--train.epochs", settings["epochs"], "--train.lr_warmup_fraction", 0.1),
        *("--train.micro_batch_size", 16, "--train.max_seq_length", settings["max_seq_length"]),
        *("--train.save_interval", "null", "--eval.interval", 10**6, "--eval.max_new_tokens", "null"),
        *more,
    ]


def train(words: list[Any], out: Path, log: Path) -> dict[str, Any]:
    """The result of one run. Ends this program if the run fails for another reason than its loss."""
    began = time.perf_counter()
    diverged = False
    with open(log, "w", encoding="utf-8") as f, redirect_stdout(f), redirect_stderr(f):
        try:
            litgpt([str(word) for word in words])
        except SystemExit:
            diverged = (out / "crash").is_dir()
            if not diverged:
                print(f"The run failed. See {log}.", file=sys.__stderr__)
                raise
    with open(out / "metrics.csv", newline="", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    losses = [float(line["val_loss"]) for line in lines if line["val_loss"]]
    return {
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "before": losses[0],
        "loss": math.inf if diverged else losses[-1],
        "seconds": round(time.perf_counter() - began, 1),
    }


class Runs:
    """The finished runs in a CSV file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[tuple[str, ...], dict[str, str]] = {}
        if file.is_file():
            with open(file, newline="", encoding="utf-8") as f:
                self.known = {self.key(line): line for line in csv.DictReader(f)}

    def key(self, settings: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(settings[name]) for name in SETTINGS)

    def find(self, settings: dict[str, Any]) -> Optional[dict[str, str]]:
        return self.known.get(self.key(settings))

    def add(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        line = {name: str(value) for name, value in {**settings, **result}.items()}
        self.known[self.key(settings)] = line
        is_new = not self.file.is_file()
        with open(self.file, "a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, [*SETTINGS, *RESULTS])
            if is_new:
                writer.writeheader()
            writer.writerow(line)


def head(exponents: Sequence[int]) -> str:
    factors = [f"x {3**n}" if n > 0 else f"/ {3**-n}" if n else "default" for n in exponents]
    names = ["model", "width", "method", "default", "before", *factors, "above the best"]
    return f"| {' | '.join(names)} |\n|---|---:|---{'|---:' * (len(factors) + 3)}|"


def line_of_table(settings: dict[str, Any], before: float, losses: list[float], middle: Optional[float]) -> str:
    """A line for one model and method; the best loss is bold. `middle` is the loss at the default rate."""
    best = min(losses)
    cells = [f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in losses]
    above = f"{100 * (middle / best - 1):.1f} %" if middle is not None else ""
    first = [settings["model"], settings["hidden"], settings["method"], f"{settings['lr']:.2g}", f"{before:.3f}"]
    return f"| {' | '.join(map(str, [*first, *cells, above]))} |"


def main(argv: list[str]) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["LITGPT_CACHE"] = str(args.out / "cache")
    rows, runs, table = write_rows(args), Runs(args.out / "runs.csv"), [head(args.exponents)]
    for name, method in itertools.product(args.models, args.methods):
        folder = find_folder(Path(name))
        width = Checkpoint(folder).config.n_embd
        middle = args.rate or default_learning_rate(method, width)
        settings = {
            **{"model": Path(name).name, "hidden": width, "method": method, "data": args.data.stem, "rows": args.rows},
            **{"val_rows": args.val_rows, "epochs": args.epochs, "max_seq_length": args.max_seq_length},
            "more": " ".join(args.more),
        }
        found: dict[int, list[dict[str, str]]] = {n: [] for n in args.exponents}
        for seed, n in itertools.product(args.seeds, args.exponents):
            cell = {**settings, "lr": float(f"{middle * 3.0**n:.3g}"), "seed": seed}
            if runs.find(cell) is None:
                out = args.out / "run"
                runs.add(cell, train(command(cell, folder, rows, out, args.more), out, args.out / "log"))
                shutil.rmtree(out)
            result = runs.find(cell)
            assert result is not None
            print(f"{cell['model']} {method} lr {cell['lr']} seed {seed}: {result['loss']} ({result['seconds']} s)")
            found[n].append(result)
        losses = {n: statistics.mean(float(r["loss"]) for r in results) for n, results in found.items()}
        before = float(found[args.exponents[0]][0]["before"])
        table.append(line_of_table({**settings, "lr": middle}, before, list(losses.values()), losses.get(0)))
    print("\n".join(table))


if __name__ == "__main__":
    main(sys.argv[1:])
