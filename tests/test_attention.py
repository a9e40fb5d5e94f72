"""Causal attention: in chunks, and over packed sequences."""

import pytest
import torch
from torch.nn import functional as F

import litgpt.model.attention as attention
import litgpt.model.chunked_attention as chunked
from litgpt.families import read_config
from litgpt.model.gpt import GPT
from tests.varlen import varlen_attn


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 31, 64, 150])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_causal_attention_is_torchs(monkeypatch, cap, kept, tokens, groups):
    if not kept:
        monkeypatch.setattr(chunked, "SHORT", 0)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, n, 8).transpose(1, 2).requires_grad_() for n in (4, groups, groups))
    target = torch.randn(2, 4, tokens, 8)
    y = chunked.CausalAttention.apply(q, k, v, 0.3, cap, 64)
    if cap is None:
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    else:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        expected = chunked.softcapped_attention(q, k, v, mask, 0.3, cap)
    torch.testing.assert_close(y, expected)
    assert y.transpose(1, 2)[:, :tokens].stride() == y.transpose(1, 2).stride()
    grads = [torch.autograd.grad((out * target).sum(), [q, k, v]) for out in (y, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_memory_of_a_long_sequence_grows_with_its_tokens(monkeypatch, cap):
    """What is kept for the backward pass, without the weights of the attention."""
    monkeypatch.setattr(chunked, "SHORT", 4 * 100**2)

    def kept(tokens: int) -> int:
        q, k, v = (torch.randn(1, 4, tokens, 8, requires_grad=True) for _ in range(3))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            chunked.CausalAttention.apply(q, k, v, 1.0, cap, 64)
        return sum(saved)

    assert kept(256) == 2 * kept(128) < kept(100)


@pytest.mark.parametrize("window", [None, 5])
def test_one_kernel_for_all_sequences(monkeypatch, window):
    """Packed sequences are passed to `varlen_attn` together, here a plain version of it."""
    fields = {
        "model_type": "mistral", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": window,
    }  # fmt: skip
    torch.manual_seed(0)
    model = GPT(read_config(fields))
    model.reset_parameters()
    ids = torch.randint(96, (1, 20))
    expected = model(ids, [9, 1, 7, 3])
    calls: list[int] = []
    monkeypatch.setattr(attention, "has_varlen", lambda x: True)
    monkeypatch.setattr(
        attention, "varlen", lambda: lambda *args, **kwargs: calls.append(1) or varlen_attn(*args, **kwargs)
    )
    torch.testing.assert_close(model(ids, [9, 1, 7, 3]), expected)
    assert len(calls) == 2
    model(ids)
    assert len(calls) == 2, "a single document has torch's own attention"


def test_this_torch_has_the_kernel():
    assert attention.varlen() is not None or not hasattr(torch.nn.attention, "varlen")
    assert not attention.has_varlen(torch.zeros(1, 8))
