"""Recomputing and compiling the blocks: the same losses, the same names, less memory, few compilations."""

import pytest
import torch

from litgpt.__main__ import main
from litgpt.data.batches import Batch
from litgpt.families import read_config
from litgpt.generate.engine import generate
from litgpt.methods.lora import LoRA
from litgpt.model import blocks
from litgpt.model.gpt import GPT
from litgpt.train.loss import LossModel
from tests.test_training import files, finetune, losses  # noqa: F401

CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}


def make_model(lora: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(read_config(CONFIG, name="test"))
    model.reset_parameters()
    if lora:
        LoRA(dropout=0.0).apply(model)
    return model


def batches(n: int) -> list[Batch]:
    """Micro-batches of other lengths and other numbers of documents each time."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(n):
        seqlens = torch.randint(2, 40, (int(torch.randint(1, 9, (), generator=draw)),), generator=draw).tolist()
        ids = torch.randint(100, (1, sum(seqlens)), generator=draw)
        made.append(Batch(ids, ids.roll(-1, 1), seqlens, sum(seqlens)))
    return made


def curve(model: GPT) -> list[float]:
    loss_model = LossModel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    for i, batch in enumerate(batches(12)):
        loss = loss_model(batch) / batch.n_target_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if i % 6 == 5:
            with torch.no_grad():
                found.append(float(loss_model(batch)))
    return found


@pytest.fixture
def compiler(monkeypatch):
    """`torch.compile` without its slow parts, the making of backward graphs and kernels; what it compiled so far."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: original(f, backend="eager", **kwargs))
    return counters


@pytest.mark.parametrize(("lora", "recompute"), [(False, False), (True, True)])
def test_compiled_blocks(compiler, lora, recompute):
    expected = curve(make_model(lora))
    model = make_model(lora)
    names = list(model.state_dict())
    blocks.compile_blocks(model)
    if recompute:
        blocks.recompute(model)
    assert curve(model) == pytest.approx(expected, abs=1e-5)
    assert list(model.state_dict()) == names
    graphs = compiler["stats"]["unique_graphs"]
    assert 0 < graphs <= 20, "lengths and numbers of documents are compiled in"
    plain = make_model(lora)
    plain.load_state_dict(model.state_dict())
    assert list(generate(model, [1, 2, 3], 20)) == list(generate(plain, [1, 2, 3], 20))
    assert compiler["stats"]["unique_graphs"] == graphs, "generation was compiled"


@pytest.mark.parametrize("micro", [1, 4])
def test_activation_checkpointing_changes_no_number(llama, files, tmp_path, micro):  # noqa: F811
    flags = ["--lora_dropout", 0.5, "--train.micro_batch_size", micro, "--train.max_steps", 6, "--eval.interval", 2]
    plain = finetune(llama, files, tmp_path / "plain", *flags)
    again = finetune(llama, files, tmp_path / "again", *flags, "--train.activation_checkpointing", "true")
    for name in ("loss", "val_loss"):
        assert [row[name] for row in again] == [row[name] for row in plain]
    assert losses(again)


def test_activation_checkpointing_keeps_less():
    """What stays in memory from the forward to the backward pass."""
    kept = []
    for recompute in (False, True):
        model = make_model(lora=False)
        if recompute:
            blocks.recompute(model)
        n_bytes = []
        count = lambda t: n_bytes.append(t.numel() * t.element_size()) or t  # noqa: B023, E731
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            LossModel(model)(batches(1)[0])
        kept.append(sum(n_bytes))
    assert kept[1] < kept[0] / 3


def test_compile_without_a_compiler(llama, files, tmp_path, capsys):  # noqa: F811
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(SystemExit) as stop:
        finetune(llama, files, tmp_path / "out", "--compile", "true")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--compile true needs a C++ compiler" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_compile(llama, files, tmp_path):  # noqa: F811
    """With the kernels."""
    flags = ["--train.max_steps", 8, "--eval.interval", 4, "--train.micro_batch_size", 3]
    plain = finetune(llama, files, tmp_path / "plain", *flags)
    for more in ([], ["--train.activation_checkpointing", "true"]):
        fast = finetune(llama, files, tmp_path / f"compiled-{len(more)}", *flags, "--compile", "true", *more)
        assert losses(fast) == pytest.approx(losses(plain), abs=1e-5)
        main(["validate", str(tmp_path / f"compiled-{len(more)}" / "final")])
