"""LitGPT's Python, as `tests/behaviors/` uses it: each function there runs here, and in LitGPT 0.5.13 if `LITGPT_PEER`
names a Python that has it."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt.checkpoint.hub import PICO

FOLDER = Path(__file__).with_name("behaviors")
PEER = os.environ.get("LITGPT_PEER", "")
FILES = ("config_and_model", "data", "llm", "methods", "prompts", "scripts", "tokenizer")
DIFFERENT = {  # what fails in LitGPT, and why it is done otherwise here
    "test_adapter_loop_without_a_reset": "LitGPT keeps a graph that was freed, unless the loop removes it",
    "test_an_input_in_a_style_without_one": "the input of a row is not lost",
    "test_cache_with_a_sliding_window": "LitGPT loses the order of tokens once its cache has wrapped around",
    "test_decode_stream_within_characters": "LitGPT shows a replacement character for each part of a character",
    "test_default_of_a_tokenizer_that_adds_bos": "LitGPT removes the BOS that the tokenizer adds by itself",
    "test_eos_that_the_text_ends_with": "LitGPT removes the EOS that it was asked for",
    "test_from_config_of_an_instruct_codellama": "LitGPT takes CodeLlama 34B for a Llama 3",
    "test_generation_ends_at_the_stop_tokens_of_a_style": "LitGPT's LLM stops at EOS alone, its commands at all",
    "test_long_prompt_with_a_sliding_window": "LitGPT refuses prompts longer than the window",
}


def behaviors(name: str) -> dict[str, Callable[[], None]]:
    """The functions of a file by their names."""
    spec = importlib.util.spec_from_file_location(f"behaviors_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEHAVIOR_FOLDER", str(PICO))
        spec.loader.exec_module(module)
    return {key: value for key, value in vars(module).items() if key.startswith("test_")}


HERE = {file: behaviors(file) for file in FILES}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file in FILES for name in HERE[file]])
def test_here(file, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEHAVIOR_FOLDER", str(PICO))
    HERE[file][name]()


def test_differences_are_behaviors():
    assert set(DIFFERENT) <= {name for file in FILES for name in HERE[file]}


@pytest.mark.long
@pytest.mark.skipif(not PEER, reason="LITGPT_PEER is not set: no LitGPT to compare with")
@pytest.mark.parametrize("file", FILES)
def test_in_litgpt(file, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"BEHAVIOR_FOLDER": str(PICO)}
    words = [PEER, str(FOLDER / f"{file}.py")]
    run = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("test_")]
    assert [line.split()[0] for line in lines] == list(HERE[file]), run.stderr[-3000:]
    failed = {line.split()[0]: line for line in lines if not line.endswith(" ok")}
    assert failed.keys() == DIFFERENT.keys() & HERE[file].keys(), failed
