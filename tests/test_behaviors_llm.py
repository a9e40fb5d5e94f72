"""LitGPT's Python: `LLM` and the modules that scripts import, as `tests/behaviors/` uses them.

Every function there runs here, and in LitGPT's Python if `LITGPT_PEER` names one.
"""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from litgpt.checkpoint.hub import PICO

FOLDER = Path(__file__).parent / "behaviors"
PEER = os.environ.get("LITGPT_PEER", "")
FILES = ("llm", "scripts")
DIFFERENT: dict[str, str] = {}  # what fails in LitGPT, and why it is done otherwise here


@cache
def behaviors(name: str) -> ModuleType:
    os.environ.setdefault("BEHAVIOR_FOLDER", str(PICO))
    spec = importlib.util.spec_from_file_location(f"behaviors_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for libraries that look up where a function is defined
    spec.loader.exec_module(module)
    return module


ALL = [(file, name) for file in FILES for name in vars(behaviors(file)) if name.startswith("test_")]


@pytest.mark.parametrize("case", ALL, ids="::".join)
def test_here(case):
    file, name = case
    getattr(behaviors(file), name)()


@pytest.mark.long
@pytest.mark.skipif(not PEER, reason="LITGPT_PEER is not set: no LitGPT to compare with")
@pytest.mark.parametrize("file", FILES)
def test_in_litgpt(file, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"BEHAVIOR_FOLDER": str(PICO)}
    words = [PEER, str(FOLDER / f"{file}.py")]
    run = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("test_")]
    names = [name for of, name in ALL if of == file]
    assert [line.split()[0] for line in lines] == names, run.stderr
    failed = {line.split()[0]: line for line in lines if not line.endswith(" ok")}
    assert failed.keys() == DIFFERENT.keys() & set(names), failed
