"""Files of behaviors, run here and by a Python that has LitGPT 0.5.13."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from litgpt.checkpoint.hub import PICO

FOLDER = Path(__file__).with_name("behaviors")
PEER = os.environ.get("LITGPT_PEER", "")  # the path of that Python


def behaviors(name: str) -> dict[str, Callable[[], None]]:
    """The functions of a file by their names."""
    os.environ["BEHAVIOR_FOLDER"] = str(PICO)
    spec = importlib.util.spec_from_file_location(f"behaviors_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {key: value for key, value in vars(module).items() if key.startswith("test_")}


def failures_there(name: str, cwd: Path) -> tuple[set[str], set[str]]:
    """The functions that succeed with LitGPT, and those that fail."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"BEHAVIOR_FOLDER": str(PICO)}
    done = subprocess.run(
        [PEER, FOLDER / f"{name}.py"], env=environment, cwd=cwd, capture_output=True, text=True, timeout=600
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("test_")]
    assert done.returncode == 0, done.stderr[-3000:]
    return {line[0] for line in lines if line[1] == "ok"}, {line[0] for line in lines if line[1] != "ok"}
