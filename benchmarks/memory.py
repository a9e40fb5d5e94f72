"""Check that memory follows the tokens: not the longest row, and not the number of steps.

    python benchmarks/memory.py rows
    python benchmarks/memory.py steps --precision bf16-true

`rows` runs a micro-batch of 64 rows of 20 tokens and one of 1,300, and one of as many tokens in equal rows, forward and
backward, each in a process of its own, and compares what each added to the resident set at its peak, and the seconds.
`steps` finetunes for 2,000 steps of rows whose lengths differ, with the real command, and compares the median of the
resident set over steps 1,500 to 2,000 with that over 300 to 800. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import add_model_flags, choose_rows, machine, publish, run, write_json

SHAPES = {"mixed": [20] * 64 + [1300], "equal": [129] * 20}  # 2,580 tokens each
SMALL = {"width": 256, "layers": 2, "heads": 4, "mlp": 688, "vocab": 4000}  # for the 2,000 steps


def resident(process: int | str = "self", what: str = "VmRSS") -> int:
    """The resident set of a process, or with VmHWM its peak, in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


def make_model(args: argparse.Namespace, sizes: dict[str, int], folder: Path) -> None:
    flags = [word for name, size in sizes.items() for word in (f"--{name}", size)]
    tokenizer = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    run([sys.executable, Path(__file__).with_name("prepare.py"), folder, *flags, *tokenizer], folder / "log")


def micro_batch(folder: Path, precision: str, seqlens: list[int], times: int) -> dict[str, Any]:
    """Run one micro-batch some times: the seconds of the fastest, and the memory that it took beyond the model's."""
    import torch

    from litgpt.data.batches import Batch
    from litgpt.methods.lora import LoRA
    from litgpt.model.devices import DTYPES
    from litgpt.model.gpt import GPT
    from litgpt.train.base_model import BaseModel
    from litgpt.train.loss import LossModel

    start = BaseModel.from_folder(folder)
    with torch.device("meta"):
        model = GPT(start.config)
    LoRA().apply(model)
    start.fill(model, DTYPES[precision], torch.device("cpu"))
    ids = torch.randint(start.config.padded_vocab_size, (1, sum(seqlens)), generator=torch.Generator().manual_seed(0))
    loss_model, batch = LossModel(model), Batch(ids, ids, seqlens, ids.numel())
    before, seconds = resident(), []
    for _ in range(times):
        began = time.perf_counter()
        loss_model(batch).backward()
        seconds.append(time.perf_counter() - began)
    return {"memory": resident(what="VmHWM") - before, "seconds": min(seconds)}


def check_rows(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sizes = {name: getattr(args, name) for name in SMALL}
    make_model(args, sizes, folder)
    found = {}
    for name in SHAPES:
        command = [sys.executable, __file__, "rows", "--precision", args.precision, "--child", folder / "model", name]
        measured = run(command, folder / "log")
        found[name] = json.loads(measured.output.splitlines()[-1])
    for key, unit, scale in (("memory", "MB", 1e6), ("seconds", "s", 1)):
        mixed, equal = (found[name][key] / scale for name in ("mixed", "equal"))
        print(f"{key:8} mixed {mixed:9.2f} {unit}, equal {equal:9.2f} {unit}, ratio {mixed / equal:.2f}")
    return found


def check_steps(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    make_model(args, SMALL, folder)
    rows = write_json(folder / "rows.json", choose_rows(args.data, 4000))
    metrics = folder / "out" / "metrics.csv"
    words = [
        *(sys.executable, "-m", "litgpt", "finetune", "lora", folder / "model", "--out_dir", folder / "out"),
        *("--data", "JSON", "--data.json_path", rows, "--data.val_split_fraction", 0, "--precision", args.precision),
        *("--data.prompt_style", "alpaca", "--data.mask_prompt", "false", "--data.too_long", "cut"),
        *("--train.global_batch_size", 4, "--train.micro_batch_size", 4, "--train.max_seq_length", 512),
        *("--train.max_steps", args.steps, "--train.epochs", args.steps, "--train.log_interval", 1),
        *("--train.save_interval", "null", "--eval.max_new_tokens", "null"),
        *("--eval.initial_validation", "false", "--eval.final_validation", "false"),
    ]
    with open(folder / "log", "w", encoding="utf-8") as log:
        child = subprocess.Popen([str(word) for word in words], stdout=log, stderr=subprocess.STDOUT)
        samples: list[tuple[int, int]] = []  # step and resident set
        while child.poll() is None:
            time.sleep(0.1)
            lines = metrics.read_text(encoding="utf-8").count("\n") if metrics.is_file() else 0
            if lines > 1 and (size := resident(child.pid)):
                samples.append((lines - 1, size))
    if child.returncode:
        sys.exit((folder / "log").read_text(encoding="utf-8"))
    early, late = (
        statistics.median(size for step, size in samples if start * args.steps <= step <= end * args.steps)
        for start, end in ((0.15, 0.4), (0.75, 1.0))
    )
    print(f"resident set: {early / 1e6:.0f} MB early, {late / 1e6:.0f} MB late, ratio {late / early:.3f}")
    return {"steps": args.steps, "early": early, "late": late}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("rows", "steps"))
    parser.add_argument("--precision", default="bf16-true", help="bf16-true (the default) or 32-true.")
    parser.add_argument("--steps", type=int, default=2000, help="Of the check of that name (2000).")
    parser.add_argument("--json", type=Path, help="A file that the line of JSON is added to.")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(micro_batch(Path(args.child[0]), args.precision, SHAPES[args.child[1]], times=3)))
        return
    with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
        check = check_rows if args.check == "rows" else check_steps
        found = check(args, Path(name))
    publish({"check": args.check, "precision": args.precision, **machine(), **found}, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
