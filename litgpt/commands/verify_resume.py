"""`litgpt verify-resume`"""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from safetensors import safe_open

from litgpt.cli.commands import members
from litgpt.errors import UserError
from litgpt.text.prompt_style import clock_at
from litgpt.train.loop import PAUSED
from litgpt.train.metrics import METRICS

METHODS = tuple(name.removeprefix("finetune_") for name in members("finetune"))
MACHINE = ("seconds", "tokens_per_s", "mfu", "peak_memory")  # metrics that differ between any two runs


def main(finetune: list[str], steps: int = 5) -> None:
    """Check that a stopped and resumed finetune gives identical results.

    Pass the method of the finetune (default: lora), its model and its options. Runs 2 * STEPS steps without a stop,
    then with a stop after STEPS, in a temporary folder, and compares metrics and weights bit by bit. Exits with 1 if
    they differ.

    Args:
        finetune: The arguments of the finetune, without the command itself.
        steps: Optimizer steps before the stop, and after it.
    """
    if steps < 1:
        raise UserError(f"--steps {steps} must be above 0.")
    words = finetune if finetune and finetune[0] in METHODS else ["lora", *finetune]
    fixed = ["--train.max_steps", str(2 * steps), "--train.epochs", "null", "--logger_name", "csv"]
    words = [*words, *fixed, "--overwrite", "false"]
    with (
        tempfile.TemporaryDirectory(prefix="litgpt-verify-") as folder,
        clock_at(),
    ):  # midnight must not change the prompts
        straight, resumed = Path(folder) / "straight", Path(folder) / "resumed"
        print(f"{2 * steps} steps without a stop ...", flush=True)
        run(words, straight, "null", "false", 0)
        print(f"{steps} steps, a stop, and {steps} more ...", flush=True)
        run(words, resumed, str(steps), "false", PAUSED)
        run(words, resumed, "null", "true", 0)
        difference = first_difference(straight, resumed)
    print(difference or "No difference: all metrics and weights are identical, bit by bit.")
    if difference:
        sys.exit(1)


def run(words: list[str], out_dir: Path, pause_after: str, resume: str, code: int) -> None:
    """Run the finetune. Raises `UserError` with the run's own error if it does not exit with this code."""
    flags = ["--out_dir", str(out_dir), "--train.pause_after", pause_after, "--resume", resume]
    command = [sys.executable, "-m", "litgpt", "finetune", *words, *flags]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode == 0 and code == PAUSED:
        raise UserError(f"The run ended before the stop after {pause_after} steps. Pass a lower --steps.")
    if done.returncode != code:
        last = (done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[-1]
        raise UserError(f"The finetune failed: {last.removeprefix('litgpt: error: ')}")


def first_difference(a: Path, b: Path) -> Optional[str]:
    return next(in_metrics(a / METRICS, b / METRICS), None) or next(in_weights(a / "final", b / "final"), None)


def in_metrics(a: Path, b: Path) -> Iterator[str]:
    with open(a, newline="", encoding="utf-8") as f, open(b, newline="", encoding="utf-8") as g:
        ours, theirs = list(csv.DictReader(f)), list(csv.DictReader(g))
    for one, other in zip(ours, theirs):
        for field, value in one.items():
            if field not in MACHINE and value != other[field]:
                yield f"Step {one['step']}: {field} is {value} without a stop, {other[field]} with one."
    if len(ours) != len(theirs):
        yield f"{METRICS} has {len(ours)} lines without a stop, {len(theirs)} with one."


def in_weights(a: Path, b: Path) -> Iterator[str]:
    files = sorted({p.name for folder in (a, b) for p in folder.glob("*.safetensors")})
    for file in files:
        if not (a / file).is_file() or not (b / file).is_file():
            yield f"{file} is missing in one of the results."
            return
        with safe_open(str(a / file), framework="pt") as f, safe_open(str(b / file), framework="pt") as g:
            if list(f.keys()) != list(g.keys()):
                yield f"{file}: the names of the tensors differ."
                return
            for name in f.keys():  # noqa: SIM118
                one, other = f.get_tensor(name), g.get_tensor(name)
                if one.shape != other.shape or one.dtype != other.dtype:
                    kinds = (
                        f"{one.dtype} {tuple(one.shape)} without a stop, {other.dtype} {tuple(other.shape)} with one"
                    )
                    yield f"{name}: {kinds}."
                elif not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                    at = tuple((one != other).nonzero()[:1].flatten().tolist())
                    yield f"{name}{list(at)}: {one[at].item()!r} without a stop, {other[at].item()!r} with one."
