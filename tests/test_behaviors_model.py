"""LitGPT's Python: tokenizer, config, model, and the modules of finetuning methods, as `tests/behaviors/` uses them.

Every function there runs here, and in LitGPT's Python if `LITGPT_PEER` names one.
"""

import importlib.util
import os
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from litgpt.checkpoint.hub import PICO

FOLDER = Path(__file__).parent / "behaviors"
PEER = os.environ.get("LITGPT_PEER", "")
DIFFERENT = {  # what fails in LitGPT, and why it is done otherwise here
    "test_cache_with_a_sliding_window": "LitGPT loses the order of tokens once its cache has wrapped around",
    "test_long_prompt_with_a_sliding_window": "LitGPT refuses prompts longer than the window",
    "test_adapter_loop_without_a_reset": "LitGPT keeps a graph that was freed, unless the loop removes it",
    "test_decode_stream_within_characters": "LitGPT shows a replacement character for each part of a character",
    "test_default_of_a_tokenizer_that_adds_bos": "LitGPT removes the BOS that the tokenizer adds by itself",
    "test_eos_that_the_text_ends_with": "LitGPT removes the EOS that it was asked for",
}


@cache
def behaviors(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"behaviors_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEHAVIOR_FOLDER", str(PICO))
        spec.loader.exec_module(module)
    return module


FILES = ("tokenizer", "config_and_model", "methods")
ALL = [(file, name) for file in FILES for name in vars(behaviors(file)) if name.startswith("test_")]


@pytest.mark.parametrize("case", ALL, ids="::".join)
def test_here(case):
    file, name = case
    getattr(behaviors(file), name)()


def test_differences_are_behaviors():
    assert set(DIFFERENT) <= {name for _, name in ALL}


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
