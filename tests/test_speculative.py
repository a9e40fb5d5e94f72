"""Speculative decoding: the text is the target's, whoever drafts."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.generate.engine import GREEDY, Request, generate
from litgpt.generate.sampling import Sampling
from litgpt.generate.speculative import Reader, Speculation, accept, draw
from litgpt.methods.model_source import ModelSource
from litgpt.model.gpt import GPT
from tests.conftest import save_llama
from tests.families import save_random

CPU = torch.device("cpu")


def load(folder: Path) -> GPT:
    return ModelSource.open(folder).model(torch.float32, CPU)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A smaller model of the same tokenizer, with a shorter context."""
    folder = tmp_path_factory.mktemp("draft") / "llama"
    return save_llama(folder, tokenizer_file, seed=3, num_hidden_layers=1, max_position_embeddings=100)


def close(model: GPT) -> GPT:
    """The same model with some noise: a draft that is often right."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


def speculate(
    speculation: Speculation, prompt: list[int], n: int, sampling: Sampling = GREEDY, **more: Any
) -> list[int]:
    request = Request(prompt, n, sampling, **more)
    list(speculation.grow([request]))
    return request.ids


PROMPTS = [[5], [7, 9, 11, 200], list(range(20, 90))]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_greedy_text_is_the_targets(llama, other, k):
    target, drafts = load(llama), [load(other), close(load(llama)), load(llama)]
    kept = []
    for draft in drafts:
        speculation = Speculation(target, draft, k)
        for prompt in PROMPTS:
            expected = list(generate(target, prompt, 50))
            assert speculate(speculation, prompt, 50) == expected
            stop = expected[20]
            whole = expected[: expected.index(stop)]
            assert speculate(speculation, prompt, 50, stop_ids={stop}) == whole
        kept.append(speculation.n_accepted / speculation.n_drafted)
    assert 0 <= kept[0] < kept[1] < kept[2] == 1


def test_to_the_end_of_both_contexts(llama, other):
    target = load(llama)
    for draft in (load(other), load(llama)):
        for n in (94, 99, 101, 250):
            expected = list(generate(target, list(range(n)), 300))
            assert speculate(Speculation(target, draft, 4), list(range(n)), 300) == expected
            assert len(expected) == 256 - n
    with pytest.raises(UserError, match="reads at most 256"):
        speculate(Speculation(target, target), [5] * 256, 1)


def test_a_penalty_counts_drafted_tokens(llama):
    target, sampling = load(llama), Sampling(0.0, repetition_penalty=1.8)
    expected = list(generate(target, [5, 6], 60, sampling))
    assert expected != list(generate(target, [5, 6], 60))
    assert speculate(Speculation(target, close(load(llama)), 4), [5, 6], 60, sampling) == expected


def test_sliding_windows_can_go_back(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=12, initializer_range=0.3))
    model.save_pretrained(tmp_path)
    target, draft = load(tmp_path), close(load(tmp_path))
    for prompt in ([5], list(range(30))):
        speculation = Speculation(target, draft, 3)
        assert speculate(speculation, prompt, 40) == list(generate(target, prompt, 40))
        assert 0 < speculation.n_accepted < speculation.n_drafted


def test_a_draft_does_not_pass_the_switch_of_longrope(tmp_path):
    """A text of more than 40 tokens rotates all of them otherwise; what comes before is to be drawn as before."""
    target, draft = load(save_random(tmp_path, "phi3", "longrope")), close(load(tmp_path))
    assert target.switch == 40
    for n in (1, 30, 37, 38, 39, 40, 41, 60):
        prompt = list(range(3, 3 + n))
        expected = list(generate(target, prompt, 30))
        for k in (1, 3, 8):
            assert speculate(Speculation(target, target, k), prompt, 30) == expected, (n, k)
            assert speculate(Speculation(target, draft, k), prompt, 30) == expected, (n, k)


def test_a_reader_reads_only_what_is_new(llama, monkeypatch):
    model, read = load(llama), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *more: read.append(ids.size(1)) or hidden(ids, *more))
    reader = Reader(model)
    for ids, n, new in (([1, 2, 3, 4], 1, 4), ([1, 2, 3, 4, 5, 6], 2, 2), ([1, 2, 3, 9, 5, 6], 1, 3), ([1, 2], 2, 2)):
        logits = reader.read(ids, n)
        assert read.pop() == new
        torch.testing.assert_close(logits, model.lm_head(hidden(torch.tensor([ids])))[0, -n:])


P = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])


@pytest.mark.parametrize("q", [[0.1, 0.4, 0.0, 0.3, 0.2], [0.5, 0.0, 0.3, 0.1, 0.1], [0.0, 0.0, 1.0, 0.0, 0.0]])
def test_what_is_drawn_has_the_targets_distribution(q):
    numbers, draft, counts = random.Random(0), torch.tensor(q), torch.zeros(2, 5)
    for _ in range(6000):
        drafted = [draw(draft, numbers), draw(draft, numbers)]
        n, last = accept([P, P.flip(0), P], [draft, draft], drafted, numbers)
        text = [*drafted[:n], last]
        counts[0, text[0]] += 1
        if len(text) > 1:
            counts[1, text[1]] += 1
    shares = counts / counts.sum(dim=1, keepdim=True)
    torch.testing.assert_close(shares[0], P, atol=0.025, rtol=0)
    if counts[1].sum() > 1500:
        torch.testing.assert_close(shares[1], P.flip(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("sampling", [Sampling(0.7, 3), Sampling(1.0, None, 0.6), Sampling(1.0, None, 1.0, 0.4)])
def test_probabilities_are_what_is_drawn(sampling):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    drawn = sampling.draw(logits.expand(20_000, -1), [random.Random(0)] * 20_000)
    shares = sampling.probabilities(logits[None])[0]
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20_000, shares, atol=0.015, rtol=0)
    assert Sampling(0.0).probabilities(logits[None]).tolist() == [[0, 1, 0, 0]]


def test_the_command(llama, other, capsys):
    flags = ["--prompt", "the quick", "--temperature", "0", "--precision", "32-true", "--accelerator", "cpu"]
    main(["generate", str(llama), *flags])
    expected = capsys.readouterr().out
    main(["generate_speculatively", str(other), str(llama), *flags, "--speculative_k", "4"])
    out, err = capsys.readouterr()
    assert out == expected and re.search(r"\d+% of \d+ drafted tokens accepted", err)
    words = [f"--draft_model_checkpoint_dir={other}", f"--target_model_checkpoint_dir={llama}", "--num_samples", "2"]
    main(["generate_speculatively", *words, *flags, "--stop", "zzz"])
    assert capsys.readouterr().out == expected * 2
    for wrong, said in (
        (["pico", str(llama)], "has another tokenizer (640 tokens)"),
        ([str(llama)], "Missing: --target_model_checkpoint_dir"),
        ([str(llama), str(llama), str(llama)], "got 3"),
        ([str(other), str(llama), "--speculative_k", "0"], "--speculative_k 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["generate_speculatively", *wrong, *flags])
        assert stop.value.code == 2 and said in capsys.readouterr().err
