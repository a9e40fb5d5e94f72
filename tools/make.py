"""What `make` runs, for machines without make: `python tools/make.py demo`, `test`, `test-all`, `lint`, or `clean`.

Each sets up a virtual environment in .venv by itself. Only Python 3.10 or newer has to be there.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
# installed before everything else, so that nothing else chooses another build; options for pip may stand here too
TORCH = os.environ.get("TORCH") or "torch==2.13.0"
DEMO = "litgpt finetune lora --config pico/lora --out_dir out/demo --overwrite"
LINT = ("ruff format --check .", "ruff check .", "mypy", "codespell")


def run(*words: str) -> None:
    """Run a program of the environment. Ends with its exit code if it fails."""
    print(*words, flush=True)
    process = subprocess.Popen([str(BIN / words[0]), *words[1:]], cwd=ROOT)
    code = None
    while code is None:
        with suppress(KeyboardInterrupt):  # Ctrl-C reaches the program, too, and a run saves before it ends
            code = process.wait()
    if code:
        sys.exit(code)


def up_to_date(stamp: Path) -> bool:
    return stamp.exists() and stamp.stat().st_mtime >= (ROOT / "pyproject.toml").stat().st_mtime


def install() -> None:
    """litgpt in .venv, unless it is there already."""
    stamp = VENV / ".installed"
    if up_to_date(stamp):
        return
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = ("python", "-m", "pip", "install", "-q")
    run(*pip, "--upgrade", "pip")
    run(*pip, *TORCH.split())
    run(*pip, "-e", ".[plot]")
    stamp.touch()


def install_tools() -> None:
    """What the tests compare with, which takes longer to install than all the rest."""
    install()
    stamp = VENV / ".tools"
    if not up_to_date(stamp):
        run("python", "-m", "pip", "install", "-q", "-e", ".[test,plot]")
        stamp.touch()


def demo() -> None:
    """Teach the built-in model to add, in under two minutes."""
    install()
    run(*DEMO.split())
    print("  litgpt finetune lora ORG/MODEL my.csv   # the same on a real model")


def lint() -> None:
    install_tools()
    for command in LINT:
        run(*command.split())


def test() -> None:
    """Everything that has to hold before a commit, in minutes."""
    lint()
    run("python", "-m", "pytest", "-n", "auto", "-m", "not long")


def test_all() -> None:
    """The same with the long tests."""
    lint()
    run("python", "-m", "pytest", "-n", "auto")


def clean() -> None:
    """Finished runs in out/ stay, the demo's excepted."""
    for folder in (VENV, ROOT / "out" / "demo"):
        shutil.rmtree(folder, ignore_errors=True)


TARGETS = {"demo": demo, "test": test, "test-all": test_all, "lint": lint, "clean": clean}

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036, nothing has checked it yet
        sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12")
    if len(sys.argv) != 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"Expected one of {', '.join(TARGETS)}: python tools/make.py demo")
    if os.name == "nt":
        os.environ["PYTHONUTF8"] = "1"  # without it, what a program writes into a pipe is not UTF-8 there
    TARGETS[sys.argv[1]]()
