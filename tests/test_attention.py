"""Causal attention on a CPU, written out."""

import gc

import pytest
import torch
from torch.nn import functional as F

import litgpt.model.attention as attention
from litgpt.imports import importing


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 31, 64, 150])
@pytest.mark.parametrize("kept", [True, False])
def test_causal_attention_is_torchs(monkeypatch, kept, tokens, groups):
    if not kept:
        monkeypatch.setattr(attention, "SHORT", 0)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, n, 8).transpose(1, 2).requires_grad_() for n in (4, groups, groups))
    target = torch.randn(2, 4, tokens, 8)
    y = attention.CausalAttention.apply(q, k, v, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(y, expected)
    assert y.transpose(1, 2)[:, :tokens].stride() == y.transpose(1, 2).stride()
    grads = [torch.autograd.grad((out * target).sum(), [q, k, v]) for out in (y, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_memory_of_a_long_document_grows_with_its_tokens(monkeypatch):
    """What is kept for the backward pass, without the weights of the attention."""
    monkeypatch.setattr(attention, "SHORT", 4 * 100**2)

    def kept(tokens: int) -> int:
        q, k, v = (torch.randn(1, 4, tokens, 8, requires_grad=True) for _ in range(3))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            attention.CausalAttention.apply(q, k, v, 1.0)
        return sum(saved)

    assert kept(256) == 2 * kept(128) < kept(100)


def test_importing_leaves_the_search_for_garbage_as_it_was():
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
