"""LitGPT's `litgpt.data` from Python behaves here as it does there."""

import pytest

from tests.behave import PEER, behaviors, failures_there

HERE = behaviors("data")
DIFFERENT = {  # what LitGPT does otherwise, and why it is not followed
    "test_generation_ends_at_the_stop_tokens_of_a_style": "LitGPT's LLM stops at EOS alone, its commands at all",
}


@pytest.mark.parametrize("name", HERE)
def test_here(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    HERE[name]()


@pytest.mark.long
@pytest.mark.skipif(not PEER, reason="LITGPT_PEER is not set: no LitGPT to compare with")
def test_there(tmp_path):
    succeed, fail = failures_there("data", tmp_path)
    assert fail == set(DIFFERENT) and succeed == set(HERE) - fail
