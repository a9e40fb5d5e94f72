"""What the benchmarks share: rows, a process that is measured, and the facts of the machine.

Nothing here imports torch: Linux counts the peak of a process's parent, at the time that it was started, as its own.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

WORDS = (
    "the of a and to in is that it was for on are with as they be at one have this from by hot word but what some we "
    "can out other were all your when up use how said an each she which do their time if will way about many then them "
    "write would like so these her long make thing see him two has look more day could go come did number sound no "
    "most people over know water than call first who may down side been now find question answer reason example"
).split()

SIZES = {
    "width": 512,
    "layers": 8,
    "heads": 8,
    "mlp": 1376,
    "vocab": 32000,
}  # of the random model: 58 million parameters


def make_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Alpaca rows of random words, the same for the same seed, whose lengths spread as those of people's rows do: a few
    are many times as long as most."""
    draw = random.Random(seed)

    def text(middle: float, spread: float, most: int) -> str:
        count = min(most, max(1, round(middle * draw.lognormvariate(0, spread))))
        return " ".join(draw.choices(WORDS, k=count)).capitalize() + "."

    return [
        {
            "instruction": text(10, 0.4, 60),
            "input": text(15, 0.8, 200) if draw.random() < 0.4 else "",
            "output": text(45, 1.0, 350),
        }
        for _ in range(n)
    ]


def choose_rows(data: Optional[Path], n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` rows of an Alpaca file (again from its beginning where it has fewer), or random ones without a file."""
    if data is None:
        return make_rows(n, seed)
    rows = json.loads(data.read_text(encoding="utf-8"))
    random.Random(seed).shuffle(rows)
    return [rows[i % len(rows)] for i in range(n)]


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return path


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, help="A folder with a tokenizer; by default the built-in pico's.")
    parser.add_argument("--data", type=Path, help="An Alpaca file (JSON); by default random words of natural lengths.")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"Of the random model ({default}).")


@dataclass
class Measured:
    """A process that has ended.

    Args:
        output: What it wrote, stdout and stderr together.
        seconds: From its start to its end.
        peak_memory: Its largest resident set in bytes; None where the system does not tell (Windows).
    """

    output: str
    seconds: float
    peak_memory: Optional[int]


def run(command: list[Any], log: Path, **environment: str) -> Measured:
    """Run a command to its end, with its output in the file `log`. Ends the program with that output if it fails."""
    words = [str(word) for word in command]
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as f:
        child = subprocess.Popen(words, stdout=f, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        peak = wait(child)
    seconds = time.perf_counter() - began
    output = log.read_text(encoding="utf-8", errors="replace")
    if child.returncode:
        sys.exit(f"{output}\nfailed with exit code {child.returncode}: {' '.join(words)}")
    return Measured(output, seconds, peak)


def wait(child: subprocess.Popen) -> Optional[int]:
    """Wait for the end of a process; its largest resident set in bytes, of it alone, not of those that ran before."""
    if not hasattr(os, "wait4"):  # Windows
        child.wait()
        return None
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """What a figure depends on besides the program."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "date": date.today().isoformat(),
        "machine": f"{name}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def gigabytes(n_bytes: Optional[float]) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes is not None else "not measured"


def publish(record: dict[str, Any], file: Optional[Path]) -> None:
    """Print a record as a line of JSON, and add it to a file."""
    line = json.dumps(record)
    print(line)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as f:
            f.write(line + "\n")
