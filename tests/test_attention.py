"""Causal attention: in chunks, and over packed sequences."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import litgpt.model.attention_kernels as attention_kernels
import litgpt.model.chunked_attention as chunked
from litgpt.families import read_config
from litgpt.generate import engine
from litgpt.generate.speculative import Speculation
from litgpt.model import kernels
from litgpt.model.gpt import GPT
from tests.varlen import varlen_attn


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 31, 64, 150])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_causal_attention_is_torchs(with_sinks, cap, window, kept, tokens, groups):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, n, 8).transpose(1, 2).requires_grad_() for n in (4, groups, groups))
    target = torch.randn(2, 4, tokens, 8)
    sinks = torch.randn(4, requires_grad=True) if with_sinks else None
    inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
    y = chunked.CausalAttention.of(q, k, v, chunked.Scores(0.3, cap, window, sinks), 64, kept)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = mask if window is None else mask.triu(1 - window)
    if sinks is not None:
        scores = q @ k.repeat_interleave(4 // groups, 1).transpose(2, 3) * 0.3
        scores = (scores if cap is None else cap * torch.tanh(scores / cap)).masked_fill(~mask, -torch.inf)
        column = sinks[:, None, None].expand(2, -1, tokens, 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        expected = weights @ v.repeat_interleave(4 // groups, 1)
    elif cap is None:
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    else:
        expected = chunked.plain_attention(q, k, v, mask, chunked.Scores(0.3, cap))
    torch.testing.assert_close(y, expected)
    assert y.transpose(1, 2)[:, :tokens].stride() == y.transpose(1, 2).stride()
    grads = [torch.autograd.grad((out * target).sum(), inputs) for out in (y, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"softcap": 0.5}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.1])}], ids=str)
def test_few_scores_at_once(how, monkeypatch):
    """In long contexts, some queries after others."""
    q, (k, v) = torch.randn(1, 4, 10, 8), (torch.randn(1, 2, 50, 8) for _ in range(2))
    mask = torch.ones(10, 50, dtype=torch.bool).tril(40)
    whole = chunked.plain_attention(q, k, v, mask, chunked.Scores(0.3, **how))
    sizes: list[int] = []
    monkeypatch.setattr(chunked, "PLAIN_SCORES", 3 * 4 * 50)
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a, **k: sizes.append(x.size(-2)) or softmax(x, *a, **k))
    torch.testing.assert_close(chunked.plain_attention(q, k, v, mask, chunked.Scores(0.3, **how)), whole)
    assert sizes == [3, 3, 3, 1]


@pytest.mark.parametrize("cap", [None, 0.5])
def test_memory_of_a_long_sequence_grows_with_its_tokens(cap):
    """What is kept for the backward pass, without the weights of the attention."""

    def kept(tokens: int, keep: bool = False) -> int:
        q, k, v = (torch.randn(1, 4, tokens, 8, requires_grad=True) for _ in range(3))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            chunked.CausalAttention.of(q, k, v, chunked.Scores(1.0, cap), 64, keep)
        return sum(saved)

    assert kept(256) == 2 * kept(128) < kept(100, True)


PLAIN = F.scaled_dot_product_attention
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
KINDS = {
    "plain": {"model_type": "mistral", "sliding_window": None},
    "window": {"model_type": "mistral", "sliding_window": 5},
    "soft cap": {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "sliding_window": 64},
    "soft cap and window": {"model_type": "gemma2", "attn_logit_softcapping": 2.0, "sliding_window": 5},
    "sinks": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 5},
}


def small_model(kind: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(read_config(SMALL | KINDS[kind]))
    model.reset_parameters()
    return model.eval()


@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_attends_to_all_sequences_at_once(kind, varlen, monkeypatch):
    """By `varlen_attn`, or as a padded batch where that kernel is missing or knows no soft cap and no sinks."""
    model, ids = small_model(kind), torch.randint(96, (1, 20))
    expected = model(ids, [9, 1, 7, 3])
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(kernels, "enabled", False)
    monkeypatch.setattr(attention_kernels, "has_varlen", lambda *_: varlen)
    monkeypatch.setattr(attention_kernels, "varlen", lambda: counted("varlen", varlen_attn))
    monkeypatch.setattr(attention_kernels, "causal_attention", counted("batch", attention_kernels.causal_attention))
    y = model(ids, [9, 1, 7, 3])
    torch.testing.assert_close(y, expected)
    assert calls == 2 * ["varlen" if varlen and model.transformer.h[0].attn.scores.fused else "batch"]
    y.sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_no_call_falls_back_to_a_kernel_that_keeps_scores(kind, dtype, plain_kernels, monkeypatch):
    """Groups of heads go to flash attention, which takes them in 16 bits and without a mask."""
    calls, original = [0], F.scaled_dot_product_attention

    def checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        assert q.size(1) == k.size(1) or (mask is None and dtype == torch.bfloat16)
        return original(q, k, v, mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", checked)
    monkeypatch.setattr(attention_kernels, "has_varlen", lambda *_: dtype == torch.bfloat16)
    monkeypatch.setattr(attention_kernels, "varlen", lambda: varlen_without_calls)
    monkeypatch.setattr(engine, "CHUNK", 7)
    model = small_model(kind).to(dtype)
    prompts = [list(range(3, 22)), list(range(3, 12)), [5]]
    together = engine.Engine(model, rows=3)
    texts = [together.submit(engine.Request(prompt, 12)) for prompt in prompts]
    while together.busy:
        together.step()
    alone = [list(engine.generate(model, prompt, 12)) for prompt in prompts]
    if dtype == torch.float32:
        assert [text.ids for text in texts] == alone
    draft = Speculation(model, model)
    request = engine.Request(prompts[0], 12)
    assert [*draft.grow([request])] and (dtype != torch.float32 or request.ids == alone[0])
    model(torch.arange(20)[None], [9, 11]).sum().backward()
    model(torch.arange(40).view(2, 20)).sum().backward()
    assert calls[0] or not model.transformer.h[0].attn.scores.fused


def varlen_without_calls(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The stand-in for `varlen_attn`, whose own attention is not checked."""
    with mock.patch.object(F, "scaled_dot_product_attention", PLAIN):
        return varlen_attn(*args, **kwargs)


def test_this_torch_has_the_kernel():
    assert attention_kernels.varlen() is not None or not hasattr(torch.nn.attention, "varlen")
    assert not attention_kernels.has_varlen(torch.zeros(1, 8), torch.zeros(1, 8))
