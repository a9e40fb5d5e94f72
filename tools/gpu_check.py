"""What `gpu_check.sh` runs; it says how to use it.

Nothing here imports torch or a part of litgpt: each item is a process of its own, which may fail, hang, or run out of
memory. As a plugin of pytest (`-p gpu_check`) this module records the result of each test when it is there.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MINUTES = 8.0  # for everything
EXTRAS = ("quantize", "pytest", "pytest-xdist", "transformers", "peft")  # extras, and packages of the extra `test`
THERE = r"torch$|triton|nvidia-|cuda-|setuptools$|pip$"  # comes with the machine: never downloaded
TESTS = ("tests/test_gpu.py", "tests/test_sequentially.py")
SMOKE_TESTS = "float32 and llama or adamw or resumed and nf4 or text_in_bfloat16 or two_adapters or experts"
FACTS = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    found |= {"gpu": properties.name, "memory": properties.total_memory, "capability": capability}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Item:
    """One process.

    Args:
        part: correctness, memory or speed.
        name: What the results call it.
        command: Its words, of which the first is a file to run by Python, or -m.
        limit: Seconds after which it is ended.
        needs: Seconds that have to be left for it to start.
    """

    part: str
    name: str
    command: tuple[str, ...]
    limit: int
    needs: int = 20


def plan(smoke: bool) -> list[Item]:
    """What runs, the most important first within each part."""
    pytest = ["-m", "pytest", "-p", "gpu_check", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu"]
    if smoke:
        return [
            Item("correctness", "tests", (*pytest, TESTS[0], "-k", SMOKE_TESTS), 150),
            training("memory", "lora", 60, case="smoke", micro_steps=1),
            training("memory", "qlora", 60, case="smoke", micro_steps=1),
            training("memory", "full", 60, case="smoke", micro_steps=1, more=("--optimizer", "AdamW8bit")),
            decoding("nf4", 60, "--model", "smoke", "--prompt_tokens", "8", "--new_tokens", "4"),
            *([training("speed", "lora", 90, case="smoke", more=("--compile",))] if shutil.which("g++") else []),
        ]
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    compiled = ("--compile",)
    return [
        Item("correctness", "tests", (*pytest, *workers, *TESTS), 150),
        training("memory", "lora", 75),
        training("memory", "qlora", 75),
        training("memory", "full", 75),
        training("memory", "lora", 60, case="packs"),
        training("memory", "full", 60, more=("--optimizer", "AdamW8bit")),
        decoding("bf16", 45),
        decoding("nf4", 60),
        training("speed", "lora", 90, more=compiled),
        training("speed", "lora", 45, case="alpaca"),
        training("speed", "qlora", 45, case="alpaca"),
        training("speed", "qlora", 90, more=compiled),
        training("speed", "full", 45, case="alpaca"),
        training("speed", "full", 90, more=compiled),
        training("speed", "lora", 90, case="packs", more=compiled),
        training("speed", "lora", 90, case="alpaca", more=compiled),
    ]


def training(
    part: str, method: str, limit: int, case: str = "packed", micro_steps: int = 3, more: tuple[str, ...] = ()
) -> Item:
    first = "3" if "--compile" in more else "1"
    words = ("--case", case, "--method", method, "--micro_steps", str(micro_steps), "--first", first, *more)
    return Item(part, " ".join(("train", case, method, *more)), ("benchmarks/gpu.py", *words), limit)


def decoding(method: str, limit: int, *more: str) -> Item:
    return Item("speed", f"decode {method}", ("benchmarks/gpu_decode.py", "--method", method, *more), limit)


# results


@dataclass
class Results:
    """Prints each result as a line of JSON, and adds it to a file."""

    file: Path | None
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: str, name: str, **more: Any) -> None:
        record = {"part": part, "name": name, **more}
        self.records.append(record)
        line = json.dumps(record)
        print(line, flush=True)
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(line + "\n")

    def keep(self, name: str, output: str) -> None:
        """Add all that a failed item printed to `errors.log`, beside the results: a record has only the end of it."""
        if self.file is not None:
            with open(self.file.with_name("errors.log"), "a", encoding="utf-8") as f:
                f.write(f"==== {name}\n{output}\n")

    def table(self) -> str:
        """A short summary: tests by outcome, and the figures of each measurement."""
        tests = [r for r in self.records if r["name"].startswith("test ")]
        passed, skipped = (sum(r["outcome"] == outcome for r in tests) for outcome in ("passed", "skipped"))
        lines = [f"tests: {passed} passed, {skipped} skipped, {len(tests) - passed - skipped} failed"]
        lines += [f"  {r['name']}: {short(r['error'])}" for r in tests if "error" in r]
        lines.append(f"{'':38} {'tokens/s':>10} {'s/micro-step':>13} {'MFU':>6} {'peak memory':>12} {'plan':>9}")
        for r in (r for r in self.records if r not in tests and r["part"] != "machine"):
            if "predicted_memory" in r:
                peaks = f"{gigabytes(r['peak_memory']):>12} {gigabytes(r['predicted_memory']):>9}"
                lines.append(f"{r['name']:38} {'':31} {peaks}")
                continue
            if "tokens_per_s" not in r:
                lines.append(f"{r['name']:38} {short(r.get('error') or r.get('skipped') or '')}")
                continue
            name = f"{r['name']} x {r['batch']}" if "batch" in r else r["name"]
            micro_step, mfu = r.get("micro_step_s"), r.get("mfu")
            lines.append(
                f"{name:38} {r['tokens_per_s']:10,.1f} {'' if micro_step is None else f'{micro_step:.3f}':>13} "
                f"{'' if mfu is None else f'{mfu:.1%}':>6} {gigabytes(r.get('peak_memory')):>12} "
                f"{gigabytes(r.get('predicted_memory')):>9}"
            )
        return "\n".join(line.rstrip() for line in lines)

    @property
    def failed(self) -> bool:
        return any("error" in record for record in self.records)


def short(text: str) -> str:
    """The last line that says something."""
    return next((line.strip()[:110] for line in reversed(text.splitlines()) if line.strip()), "")


def gigabytes(n: float | None) -> str:
    return "" if n is None else f"{n / 1e9:.2f} GB"


def pytest_runtest_logreport(report: Any) -> None:
    """A hook of pytest: a line for each test, at once, as nothing else would be left of tests before one that hangs."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return  # the process that started the workers hears of their tests too
    record = {"name": "test " + report.nodeid.split("::", 1)[-1], "outcome": report.outcome}
    record |= {"seconds": round(report.duration, 2)}
    if report.outcome == "failed":
        record["error"] = report.longreprtext[-1500:]
    with open(os.environ["GPU_CHECK_FILE"], "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


# processes


def run(item: Item, results: Results, environment: dict[str, str], left: float, logs: Path) -> None:
    """Run an item and add its results, those too that it left before it failed."""
    file = logs / (re.sub(r"\W+", "-", item.name) + ".jsonl")
    command = [sys.executable, *item.command, *(["--json", str(file)] if item.command[0] != "-m" else [])]
    began, limit = time.monotonic(), min(item.limit, left)
    code, output = ended(command, limit, environment | {"GPU_CHECK_FILE": str(file)}, file.with_suffix(".log"))
    seconds = round(time.monotonic() - began, 1)
    if code != 0:
        results.keep(item.name, output)
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    for record in records:
        results.add(item.part, record.pop("name", item.name), **record)
    failed_tests = item.name == "tests" and code == 1 and any("error" in r for r in records)  # each has its line
    if code is None:
        results.add(item.part, item.name, error=f"{output[-1500:]}\nended after {limit:.0f} s", seconds=seconds)
    elif code and not failed_tests:
        results.add(item.part, item.name, error=output[-1500:] or f"exit code {code}", seconds=seconds)
    elif item.name == "tests" and not records:
        results.add(item.part, item.name, error="no test ran", seconds=seconds)


def ended(command: list[str], limit: float, environment: dict[str, str], log: Path) -> tuple[int | None, str]:
    """The exit code of a command, None if it was ended at its limit, and what it printed. Also ends what it started."""
    with open(log, "w", encoding="utf-8") as f:
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "preexec_fn": os.setpgrp}
        child = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, **options)
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")


def predict(item: Item, results: Results, environment: dict[str, str], limit: float, logs: Path) -> None:
    """Say what `litgpt plan` predicts for a training, beside the peak memory that was measured."""
    measured, file = results.records[-1], logs / "plan.jsonl"
    if "peak_memory" not in measured:
        results.add(item.part, f"predict {item.name}", skipped="nothing was measured")
        return
    words = [f"--{name}={measured[name]}" for name in ("case", "method", "precision", "optimizer")]
    words += [] if measured["case"] == "smoke" else [f"--model={measured['model']}"]
    command = [sys.executable, "benchmarks/gpu_plan.py", *words, f"--json={file}"]
    code, output = ended(command, limit, environment, logs / "plan.log")
    if code != 0:
        results.keep(f"predict {item.name}", output)
        results.add(item.part, f"predict {item.name}", error=output[-1500:] or f"exit code {code}")
        return
    found, peak = json.loads(file.read_text(encoding="utf-8").splitlines()[-1]), measured["peak_memory"]
    is_gpu = measured["device"] != "cpu"  # on a CPU, the whole process was measured
    ratio = round(found["predicted_memory"] / peak, 4) if is_gpu else None
    results.add(item.part, f"predict {item.name}", **found, peak_memory=peak, predicted_to_measured=ratio)


def facts(results: Results, environment: dict[str, str], logs: Path) -> bool:
    """Add what the machine is. Returns whether torch sees a GPU."""
    code, output = ended([sys.executable, "-c", FACTS], 90, environment, logs / "facts.log")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if code == 0 and lines else {"error": output[-500:]}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found["driver"] = None
    for name in ("triton", "bitsandbytes", "transformers"):
        found[name] = version(name)
    results.add("machine", "facts", **found)
    return "gpu" in found


# packages


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """What this needs of `pyproject.toml`, with the versions there."""
    import tomllib  # of Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found = [*project["dependencies"]]
    for name in EXTRAS:
        found += extras.get(name) or [r for r in extras["test"] if re.match(rf"{name}\b(?!-)", r)]
    return found


def all_requirements() -> Iterator[Any]:
    """With what they need in turn, as far as the metadata of what is installed here says. Without torch's own."""
    from packaging.requirements import Requirement

    waiting, seen = [Requirement(r) for r in requirements()], set()
    where = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux"}
    where |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    while waiting:
        requirement = waiting.pop(0)
        name = normal(requirement.name)
        if name in seen or re.match(THERE, name):
            continue
        seen.add(name)
        yield requirement
        needs = (metadata.requires(name) or []) if version(name) else []
        for other in map(Requirement, needs):
            extras = requirement.extras or {""}
            if other.marker is None or any(other.marker.evaluate(where | {"extra": e}) for e in extras):
                waiting.append(other)


def missing() -> list[str]:
    """The packages that are not here, or not in the version that `pyproject.toml` asks for."""
    own, names = {re.split(r"[^\w.-]", r)[0] for r in requirements()}, []
    for requirement in all_requirements():
        name, found = requirement.name, version(requirement.name)
        if found is None or (name in own and not requirement.specifier.contains(found, True)):
            names.append(name)
    return names


def download_command(folder: str, names: list[str]) -> str:
    """How to fetch packages where there is a network. `--no-deps`: else pip fetches torch and all of CUDA."""
    platforms = ["manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
    words = "python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp"
    chosen = " ".join(f"--platform {p}" for p in platforms)
    return f"{words} {chosen} -d {folder} {' '.join(repr(n) if re.search('[<>]', n) else n for n in names)}"


def provide(folder: str | None, results: Results, site: Path, logs: Path) -> None:
    """Install the missing packages from a folder of wheels beside the machine's own. What is still missing is an
    error: without it, less can run."""
    names = missing()
    if names and folder is not None:
        print(f"# where there is a network:\n# {download_command(folder, names)}", flush=True)
        wheels = {normal(wheel.name.split("-")[0]) for wheel in Path(folder).glob("*.whl")}
        sys.path.insert(0, str(site))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        tried: set[str] = set()
        while chosen := [name for name in names if normal(name) in wheels and name not in tried]:
            tried.update(chosen)
            command = [*pip, "--find-links", str(Path(folder).resolve()), "--target", str(site), *chosen]
            code, output = ended(command, 90, dict(os.environ), logs / "pip.log")
            if code != 0:
                results.add("machine", "packages", error=output[-1000:])
            importlib.invalidate_caches()
            names = missing()  # those that the new ones need, too
    if names:
        results.add("machine", "packages", error=f"missing: {' '.join(names)}; see --wheels")


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


@contextmanager
def survived(results: Results, part: str, name: str) -> Iterator[None]:
    """An error of this script is a result like others."""
    try:
        yield
    except Exception as e:
        results.add(part, name, error=f"{type(e).__name__}: {e}")


def show_list(smoke: bool, folder: str | None) -> None:
    for item in plan(smoke):
        print(f"{item.part:12} {item.limit:4} s  {item.name:40} {' '.join(item.command)}")
    names = [f"{r.name}{r.specifier}" for r in all_requirements()]
    print(f"\npackages: {' '.join(names)}\nmissing here: {' '.join(missing()) or 'none'}")
    print(f"\nto fetch all but torch, where there is a network:\n{download_command(folder or '.wheels', names)}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu_check.sh", description="Everything that needs a GPU.")
    parser.add_argument("--smoke", action="store_true", help="On a CPU, with tiny models.")
    parser.add_argument("--list", action="store_true", help="Show what would run, and the packages that it needs.")
    parser.add_argument("--wheels", metavar="DIR", help="Install missing packages from the wheels in this folder.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"Time for everything ({MINUTES:g}).")
    parser.add_argument("--only", metavar="TEXT", help="Only items with this text in `part name`.")
    args = parser.parse_args(argv)
    if args.list:
        show_list(args.smoke, args.wheels)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what runs
    end = time.monotonic() + 60 * args.minutes
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    results = Results(out and out / "results.jsonl")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        logs, site = Path(name), Path(name) / "site"
        path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
        environment |= {"LITGPT_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""} if args.smoke else {}
        with survived(results, "machine", "packages"):
            provide(args.wheels, results, site, logs)
        if not facts(results, environment, logs) and not args.smoke:
            print("There is no GPU here: nothing was checked. --smoke runs on a CPU.", file=sys.stderr)
            return 2
        for item in plan(args.smoke):
            if args.only and args.only not in f"{item.part} {item.name}":
                continue
            left = end - time.monotonic()
            if left < item.needs:
                results.add(item.part, item.name, skipped=f"{left:.0f} s were left")
                continue
            with survived(results, item.part, item.name):
                run(item, results, environment, left, logs)
                if item.part == "memory":
                    predict(item, results, environment, min(30, end - time.monotonic()), logs)
    print("\n" + results.table())
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
