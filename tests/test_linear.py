"""The products of the model on a CPU, and that there are few kinds of them."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import litgpt.model.kernels_cpu as module
from litgpt.data.batches import UNTRAINED, Batch
from litgpt.families import read_config
from litgpt.methods.quantize import QuantizedLinear, bitsandbytes, in_tiles
from litgpt.model.chunked_attention import ROUND, rounded
from litgpt.model.gpt import GPT
from litgpt.model.kernels_cpu import LARGE, onednn
from litgpt.model.linear import Linear, linear, prepack, undo_prepack
from litgpt.train.loss import LossModel

FIELDS = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("tokens", [64, 65], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_torchs(monkeypatch, tokens, bias):
    calls: list[torch.Tensor] = []
    fast = module.matmul
    monkeypatch.setattr(module, "matmul", lambda x, weight: calls.append(x) or fast(x, weight))
    torch.manual_seed(0)
    layer = Linear(512, 1024, bias=bias)
    x = torch.randn(1, tokens, 512, requires_grad=True)
    assert x.numel() * 1024 >= LARGE
    y = layer(x)
    found = torch.autograd.grad((y * y).sum(), [x, *layer.parameters()])
    assert len(calls) == (3 if tokens % ROUND == 0 and onednn() else 0)
    again = F.linear(x, layer.weight, layer.bias)
    expected = torch.autograd.grad((again * again).sum(), [x, *layer.parameters()])
    for a, b in zip((y, *found), (again, *expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_a_frozen_weight_keeps_no_input():
    layer = Linear(512, 1024, bias=False).requires_grad_(False)
    x = torch.randn(64, 512, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert all(t.data_ptr() == layer.weight.data_ptr() for t in saved)


def test_autocast_reaches_it():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(64, 512), torch.randn(1024, 512)).dtype == torch.bfloat16


@pytest.mark.skipif(not onednn(), reason="for processors with AVX-512")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_packed_model_answers_the_same_and_is_plain_again(monkeypatch, dtype):
    monkeypatch.setattr(module, "PREPACKED_SIZE", {dtype: 0})
    torch.manual_seed(0)
    model = GPT(read_config({**FIELDS, "tie_word_embeddings": True})).to(dtype).requires_grad_(False).eval()
    trained = Linear(16, 16).to(dtype)
    prepack(trained)
    assert not trained.weight.is_mkldnn, "an optimizer may hold it"
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ids = torch.randint(96, (1, 70))
    expected = [model(ids[:, :n]) for n in (1, 7, 70)]
    prepack(model)
    packed = [layer.weight.is_mkldnn for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert all(packed) and len(packed) == 9 and not model.transformer.wte.weight.is_mkldnn
    for n, logits in zip((1, 7, 70), expected):
        torch.testing.assert_close(model(ids[:, :n]), logits)
    with torch.enable_grad(), pytest.raises(AssertionError, match="no gradient"):
        model.lm_head(torch.randn(1, 16, dtype=dtype, requires_grad=True))
    undo_prepack(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.int8"])
@torch.no_grad()
def test_packed_4_bits_are_the_same_numbers(scheme):
    functional = bitsandbytes().functional
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = nn.Linear(128, 96, bias=False)
    layer.parts = (64, 32)
    quantized = QuantizedLinear(layer, scheme).eval()
    for part, rows in enumerate(layer.parts):
        quantized.store(part, torch.randn(rows, 128, dtype=torch.bfloat16))
    x = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    expected, whole = quantized(x), quantized.dequantized()
    prepack(quantized)
    found = quantized(x)
    if scheme != "bnb.int8" and onednn() and functional.has_avx512bf16():
        assert all(in_tiles(state) for _, state in quantized.stored)
        assert torch.equal(found[:, 2:3], quantized(x[:, 2:3]))
        assert (found - expected).norm() < 0.004 * expected.norm()  # what bfloat16 scales and sums may do
        with pytest.raises(AssertionError):
            quantized.dequantized()
    else:
        assert torch.equal(found, expected) and torch.equal(quantized.dequantized(), whole)


@pytest.mark.parametrize("trained", [0, 5, 70])
def test_lengths_are_rounded_up(trained):
    """Every product of a batch, the head's too, has a multiple of `ROUND` rows, and the loss does not change."""
    torch.manual_seed(0)
    model = GPT(read_config(FIELDS, name="tiny"))
    model.reset_parameters()
    seen = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda m, args, y: seen.add(args[0].shape[:-1].numel()))
    ids = torch.randint(96, (1, 77))
    targets = ids.roll(-1, 1)
    targets[0, trained:] = UNTRAINED
    loss = LossModel(model)(Batch(ids, targets, [33, 1, 43], trained))
    assert all(n % ROUND == 0 for n in seen)
    expected = F.cross_entropy(model(ids, [33, 1, 43])[0], targets[0], reduction="sum", ignore_index=UNTRAINED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    if trained:
        pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_round_numbers_are_few_and_near():
    numbers = [rounded(n) for n in range(1, 4097)]
    assert all(n <= r < n + max(ROUND, n / 8) and r % ROUND == 0 for n, r in enumerate(numbers, 1))
    assert len(set(numbers)) == 16 + 8 * 3 and rounded(0) == 0


def test_a_model_without_weights_needs_no_compiler():
    """torch draws values on the meta device through its compiler, whose import takes a second."""
    code = (
        "import sys, torch; from litgpt.families import read_config; from litgpt.model.gpt import GPT\n"
        f"with torch.device('meta'): GPT(read_config({FIELDS!r}, name='tiny'))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
