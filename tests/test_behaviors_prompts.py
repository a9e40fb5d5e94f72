"""LitGPT's `litgpt.prompts` from Python behaves here as it does there."""

import pytest

from tests.behave import PEER, behaviors, failures_there

HERE = behaviors("prompts")
DIFFERENT = {  # what LitGPT does otherwise, and why it is not followed
    "test_from_config_of_an_instruct_codellama": "LitGPT takes CodeLlama 34B for a Llama 3",
    "test_an_input_in_a_style_without_one": "the input of a row is not lost",
}


@pytest.mark.parametrize("name", HERE)
def test_here(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    HERE[name]()


@pytest.mark.long
@pytest.mark.skipif(not PEER, reason="LITGPT_PEER is not set: no LitGPT to compare with")
def test_there(tmp_path):
    succeed, fail = failures_there("prompts", tmp_path)
    assert fail == set(DIFFERENT) and succeed == set(HERE) - fail
