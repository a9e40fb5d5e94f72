"""`from litgpt import LLM`, as LitGPT's users know it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import litgpt
from litgpt import LLM, PromptStyle
from litgpt.api import benchmark_dict_to_markdown_table
from litgpt.checkpoint.hub import PICO
from litgpt.errors import UserError
from litgpt.generate.engine import generate
from litgpt.generate.inference_model import InferenceModel
from litgpt.model import kernels_cpu
from litgpt.model.kernels_cpu import onednn

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "tutorials" / "developer-docs" / "python-api.md"


@pytest.fixture(scope="module")
def loaded() -> InferenceModel:
    return InferenceModel.open(PICO, precision="32-true", accelerator="cpu")


@pytest.fixture
def llm() -> LLM:
    return LLM.load("pico", precision="32-true", accelerator="cpu")


def ids_of(loaded: InferenceModel, messages: list[dict[str, Any]], n: int = 50) -> list[int]:
    _, ids = loaded.render(messages)
    return list(generate(loaded.model, ids, n, stop_ids=loaded.stop_ids))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_names_come_without_torch():
    code = (
        "import sys, litgpt; print('torch' in sys.modules); from litgpt import LLM, GPT, Config, Tokenizer, PromptStyle"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "False\n", run.stderr
    assert {"LLM", "GPT", "Config", "Tokenizer", "PromptStyle"} <= set(litgpt.__all__)


# answers


def test_one_prompt(llm, loaded):
    expected = ids_of(loaded, [user("Hello")])
    text = loaded.tokenizer.decode(expected)
    for greedy in ({"top_k": 1}, {"temperature": 0.0}, {"top_p": 0.0}):
        assert llm.generate("Hello", **greedy) == text
    assert "".join(llm.generate("Hello", top_k=1, stream=True)) == text
    assert len(list(llm.generate("Hello", top_k=1, stream=True))) > 3
    ids = llm.generate("Hello", top_k=1, return_as_token_ids=True)
    assert ids.dtype == torch.long and ids.tolist() == expected
    assert torch.cat(list(llm.generate("Hello", top_k=1, return_as_token_ids=True, stream=True))).tolist() == expected
    assert llm.generate("Hello", top_k=1, max_new_tokens=3) == loaded.tokenizer.decode(expected[:3])
    assert llm.generate("Hello", top_k=1, stop=text[4:7]) == text[:4]
    system = {"role": "system", "content": "Be kind."}
    assert llm.generate("Hello", "Be kind.", top_k=1) == loaded.tokenizer.decode(
        ids_of(loaded, [system, user("Hello")])
    )


def test_many_prompts(llm, loaded):
    prompts = ["Hello", "Who are you?", "A story about the fox and the boat", "Why?", "x"]
    answers = [ids_of(loaded, [user(p)]) for p in prompts]
    assert llm.generate(prompts, top_k=1, batch_size=2) == [loaded.tokenizer.decode(a) for a in answers]
    found = llm.generate(prompts, top_k=1, return_as_token_ids=True)
    assert [ids.tolist() for ids in found] == answers
    assert llm.generate([]) == []
    with pytest.raises(UserError, match="one prompt"):
        llm.generate(prompts, stream=True)


def test_chat(llm, loaded):
    messages = [user("Hello"), {"role": "assistant", "content": "Hi"}, user("Why?")]
    expected = loaded.tokenizer.decode(ids_of(loaded, messages))
    assert llm.chat(messages, top_k=1) == expected == "".join(llm.chat(messages, top_k=1, stream=True))
    for wrong in ("Hello", [], ["Hello"]):
        with pytest.raises(UserError, match="list of messages"):
            llm.chat(wrong)


def test_seeds(llm):
    assert llm.generate("Story", seed=1) == llm.generate("Story", seed=1) != llm.generate("Story", seed=2)
    torch.manual_seed(3)
    one = llm.generate("Story"), llm.generate("Story")
    torch.manual_seed(3)
    assert (llm.generate("Story"), llm.generate("Story")) == one and one[0] != one[1]


def test_a_style_of_ones_own(llm, loaded):
    llm.prompt_style = PromptStyle.from_name("alpaca")
    text = llm.prompt_style.apply("Add.", input="1")
    assert "### Input:\n1" in text
    text = llm.prompt_style.apply("Add.")
    ids = loaded.tokenizer.encode(text)
    stop = loaded.tokenizer.stop_ids
    assert llm.generate("Add.", top_k=1) == loaded.tokenizer.decode(generate(loaded.model, ids, 50, stop_ids=stop))

    class Mine(PromptStyle):
        name = "mine"

        def prompt(self, messages: Any, tools: Any = None) -> str:
            return f"Q: {messages[-1]['content']} A:"

    llm.prompt_style = Mine()
    ids = loaded.tokenizer.encode("Q: Add. A:")
    assert llm.generate("Add.", top_k=1) == loaded.tokenizer.decode(generate(loaded.model, ids, 50, stop_ids=stop))
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        PromptStyle.from_name("alpacca")


def test_what_is_refused(llm):
    with pytest.raises(UserError, match="max_new_tokens"):
        llm.generate("Hello", max_new_tokens=0)
    with pytest.raises(UserError, match="reads at most 256"):
        llm.generate("Hello " * 300, stream=True)
    for wrong in (
        {"init": "zeros"},
        {"tokenizer_dir": "x"},
        {"init": "random", "quantize": "x"},
    ):
        with pytest.raises(UserError):
            LLM.load("pico", **wrong)
    with pytest.raises(UserError, match="No model folder"):
        LLM.load("no/such-model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "bf16"}, "precision 'bf16': choose from 32-true, .* Did you mean 'bf16-true'"),
        ({"quantize": "nf4"}, "quantize 'nf4': choose from bnb.nf4"),
        ({"accelerator": "gpu"}, "accelerator 'gpu': choose from auto, cpu"),
    ],
)
def test_wrong_choices(llm, options, words):
    with pytest.raises(UserError, match=words):
        LLM.load("pico", **options)
    with pytest.raises(UserError, match=words):
        llm.distribute(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": None}, "as prompt, got null"),
        ({"prompt": {"role": "user", "content": "Hello"}}, "as prompt, got an object"),
        ({"prompt": ["Hello", 5]}, "prompt '5' is neither a text nor a list of messages"),
        ({"prompt": [{"content": "Hello"}]}, "is neither a text nor a list of messages"),
        ({"prompt": [["Hello"]]}, "is neither a text nor a list of messages"),
        ({"prompt": "Hello", "max_new_tokens": 2.5}, "max_new_tokens, got 2.5"),
        ({"prompt": "Hello", "batch_size": 0}, "batch_size, got 0"),
    ],
)
def test_wrong_prompts(llm, options, words):
    with pytest.raises(UserError, match=words):
        llm.generate(**options)


# devices


def test_distribute(llm):
    text = llm.generate("Hello", top_k=1)
    assert llm.distribute(devices=1, accelerator="cpu") is llm
    assert llm.model.dtype in (torch.float32, torch.bfloat16)
    llm.distribute(accelerator="cpu", precision="32-true", fixed_kv_cache_size="max_model_supported")
    assert llm.model.dtype == torch.float32 and llm.generate("Hello", top_k=1) == text
    llm.distribute(accelerator="cpu", precision="32-true", generate_strategy="sequential", fixed_kv_cache_size=12)
    assert llm.generate("Hello", top_k=1) == text[: len(llm.generate("Hello", top_k=1))] != text
    with pytest.raises(UserError, match="it must fit into 12"):
        llm.generate("Hello " * 12)
    for wrong, words in (
        ({"devices": 7}, "this machine has 1"),
        ({"devices": "two"}, "devices, got 'two'"),
        ({"generate_strategy": "tensor_parallel"}, "litgpt generate_tp"),
        ({"generate_strategy": "other"}, "choose from sequential"),
        ({"fixed_kv_cache_size": 0}, "fixed_kv_cache_size, got 0"),
        ({"fixed_kv_cache_size": 10**6}, "fixed_kv_cache_size=1000000"),
    ):
        with pytest.raises(UserError, match=words):
            llm.distribute(accelerator="cpu", **wrong)


def test_quantized(base):
    pytest.importorskip("bitsandbytes")
    llm = LLM.load(base, distribute=None)
    text = llm.generate("the quick", top_k=1)
    llm.distribute(accelerator="cpu", quantize="bnb.nf4")
    same = LLM.load(base, quantize="bnb.nf4", accelerator="cpu").generate("the quick", top_k=1)
    assert llm.generate("the quick", top_k=1) == same != text
    with pytest.raises(UserError, match="cannot be trained"):
        llm.trainer_setup()
    with pytest.raises(UserError, match="cannot be saved"):
        llm.save("x")


def test_benchmark(llm):
    text, figures = llm.benchmark(num_iterations=3, prompt="Hello", top_k=1, stream=True)
    assert text == llm.generate("Hello", top_k=1)
    assert {"Seconds total", "Seconds to first token", "Tokens generated"} < set(figures)
    assert all(len(values) == 3 for values in figures.values())
    assert figures["Tokens generated"] == [len(llm.generate("Hello", top_k=1, return_as_token_ids=True))] * 3
    table = benchmark_dict_to_markdown_table(figures).splitlines()
    assert table[0] == "| Metric | Mean | Std Dev |" and len(table) == 2 + len(figures)


# weights


def test_random_weights_are_trained_and_saved(tmp_path):
    torch.manual_seed(0)
    llm = LLM.load("pico", init="random", accelerator="cpu")
    assert isinstance(llm.model, litgpt.GPT) and isinstance(llm.config, litgpt.Config)
    assert isinstance(llm.tokenizer, litgpt.Tokenizer)
    llm.trainer_setup()
    ids = llm.tokenizer.encode("Hello there, who are you?")
    batch = torch.stack([ids, ids]).long()
    optimizer = torch.optim.AdamW(llm.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        logits, loss = llm(batch, target_ids=batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert logits.shape == (2, len(ids), llm.config.padded_vocab_size) and losses[-1] < losses[0] / 2
    assert torch.equal(llm(batch), llm.model(batch))
    _, own = llm(batch, batch, loss_fn=lambda logits, targets: logits.sum() * 0 + targets.sum())
    assert own == batch[:, 1:].sum()
    assert llm.training and llm.generate("Hello", top_k=1) is not None and llm.training
    llm.save(tmp_path / "out")
    again = LLM.load(tmp_path / "out", precision="32-true", accelerator="cpu")
    assert again.generate("Hello", top_k=1) == llm.generate("Hello", top_k=1)
    ours, theirs = llm.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    llm.distribute(accelerator="cpu", precision="32-true")
    assert all(torch.equal(t, theirs[k]) for k, t in llm.state_dict().items()), "what was trained is not read again"
    with pytest.raises(UserError, match="already exists"):
        llm.save(tmp_path / "out")
    with pytest.raises(UserError, match="cannot be quantized"):
        llm.distribute(accelerator="cpu", quantize="bnb.nf4")
    checkpoint = {"state_dict": {f"llm.{k}": v for k, v in llm.state_dict().items()}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    other = LLM.load("pico", init="random", accelerator="cpu")
    other.trainer_setup(trainer_ckpt=tmp_path / "last.ckpt")
    assert torch.equal(other(batch), llm(batch))


def test_ignored_targets(llm):
    ids = llm.tokenizer.encode("Hello there, who are you?")[None].long()
    targets = ids.clone()
    targets[:, :3] = -100
    logits, loss = llm(ids, targets)
    expected = torch.nn.functional.cross_entropy(logits[0, 2:-1], ids[0, 3:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert llm(ids, targets * 0 - 100)[1].item() == 0


def test_adapter(whole, base, tmp_path):
    folder = whole("lora") / "final"
    llm = LLM.load(folder, base=base, accelerator="cpu")
    assert llm.checkpoint_dir == folder
    text = llm.generate("the quick", top_k=1)
    llm.save(tmp_path / "copy")
    assert LLM.load(tmp_path / "copy", accelerator="cpu").generate("the quick", top_k=1) == text
    llm.trainer_setup()
    with pytest.raises(UserError, match="litgpt finetune"):
        llm.save(tmp_path / "trained")


@pytest.mark.skipif(not onednn(), reason="for processors with AVX-512")
def test_an_answer_leaves_the_weights(monkeypatch, llm, tmp_path):
    monkeypatch.setattr(kernels_cpu, "PREPACKED_SIZE", {torch.float32: 0})
    ids = llm.tokenizer.encode("Hello there, who are you?")[None].long()
    before = {name: t.clone() for name, t in llm.state_dict().items()}
    with torch.no_grad():
        logits = llm(ids)

    def answer() -> str:
        text = llm.generate("Hello", top_k=1)
        assert llm.inner.lm_head.weight.is_mkldnn
        return text

    text = answer()
    with torch.no_grad():
        torch.testing.assert_close(llm(ids), logits)
    assert llm.inner.lm_head.weight.is_mkldnn
    with pytest.raises(AssertionError, match="no gradient"):
        llm.inner.transformer.h[0].mlp(torch.randn(1, 1, llm.config.n_embd, requires_grad=True))
    uses: list[Callable[[], Any]] = [
        lambda: llm.save(tmp_path / "out"),
        lambda: llm.to(torch.float32),
        lambda: list(llm.parameters()),
        lambda: llm(ids),
        lambda: llm.model,
        llm.trainer_setup,
    ]
    for use in uses:
        use()
        assert not llm.inner.lm_head.weight.is_mkldnn
        assert all(torch.equal(t, before[name]) for name, t in llm.state_dict().items())
        assert llm.model.lm_head.weight is llm.model.transformer.wte.weight or not llm.config.tie_embeddings
        if not llm.changed and not llm.in_graph:
            assert answer() == text
    kept = llm(ids)
    assert llm.generate("Hello", top_k=1) == text, "while a graph holds the weights"
    kept.sum().backward()
    assert all(p.grad is not None for p in llm.parameters())


@pytest.mark.skipif(not onednn(), reason="for processors with AVX-512")
def test_an_optimizer_holds_what_is_trained(monkeypatch, llm):
    monkeypatch.setattr(kernels_cpu, "PREPACKED_SIZE", {torch.float32: 0})
    ids = llm.tokenizer.encode("Hello there, who are you?")[None].long()
    llm.generate("Hello", top_k=1)
    outer = torch.nn.ModuleList([llm]).requires_grad_(True)
    held = list(outer.parameters())
    outer.train()
    llm(ids).sum().backward()
    assert all(p.grad is not None for p in llm.parameters())
    assert {id(p) for p in llm.parameters()} <= {id(p) for p in held}


def test_what_was_saved_after_an_answer(monkeypatch, llm, tmp_path):
    monkeypatch.setattr(kernels_cpu, "PREPACKED_SIZE", {torch.float32: 0})
    text = llm.generate("Hello", top_k=1)
    llm.save(tmp_path / "out")
    assert LLM.load(tmp_path / "out", precision="32-true", accelerator="cpu").generate("Hello", top_k=1) == text


# the page


def test_the_snippets_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 6
    for snippet in snippets:
        space: dict[str, Any] = {}
        exec(compile(snippet, str(PAGE), "exec"), space)
    assert capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "trained" / "config.json").read_text())["model_type"] == "llama"


def test_a_style_for_prompts_alone_is_not_trained_with():
    class Mine(PromptStyle):
        name = "mine"

        def prompt(self, messages, tools=None):
            return "Q: " + messages[-1]["content"]

    assert Mine().apply("Hello") == "Q: Hello"
    with pytest.raises(UserError, match="'mine' cannot be trained with"):
        Mine().render_row([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(TypeError, match="prompt"):
        PromptStyle()
