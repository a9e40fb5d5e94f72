"""The chunked loss is the plain one, in value and in gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from litgpt.data.batches import UNTRAINED
from litgpt.methods.lora import LoRA, LoRALinear
from litgpt.model import kernels, kernels_cpu
from litgpt.train import loss as module


@pytest.mark.parametrize("kind", ["frozen", "trained", "bias", "lora"])
@pytest.mark.parametrize("positions", [0, 1, 7, 50])
def test_head_loss(kind, positions, monkeypatch):
    monkeypatch.setattr(module, "ROUND", 1)
    monkeypatch.setattr(kernels_cpu, "HEAD_LOGITS", 7 * 11)  # seven positions at once ...
    monkeypatch.setattr(kernels_cpu, "LOGITS", 3 * 11)  # ... and their gradient three at a time
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(6, 11, bias=kind == "bias")
    head.requires_grad_(kind in ("trained", "bias"))
    if kind == "lora":
        head = LoRALinear(head, LoRA(r=2, alpha=4, dropout=0.0))
        nn.init.normal_(head.lora_B)
    hidden = torch.randn(60, 6, requires_grad=True)
    targets = torch.full((60,), UNTRAINED)
    targets[torch.randperm(60)[:positions]] = torch.randint(11, (positions,))
    trained = [p for p in head.parameters() if p.requires_grad]

    expected = F.cross_entropy(head(hidden), targets, ignore_index=UNTRAINED, reduction="sum")
    actual = module.head_loss(hidden, head, targets, (targets != UNTRAINED).nonzero().squeeze(1))
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected / 3, [hidden, *trained])
    for a, b in zip(torch.autograd.grad(actual / 3, [hidden, *trained]), wanted):
        torch.testing.assert_close(a, b)


def test_no_gradient_is_made_where_none_is_wanted():
    head = nn.Linear(6, 11).requires_grad_(False)
    with torch.no_grad():
        assert not module.head_loss(torch.randn(5, 6), head, torch.arange(5), torch.arange(5)).requires_grad


@pytest.mark.parametrize("plain", [False, True])
def test_gradient_of_a_bfloat16_head(plain, monkeypatch):
    """Through 64 chunks, which are not summed in bfloat16. Each chunk's own gradient is rounded once."""
    monkeypatch.setattr(kernels, "enabled", not plain)
    n_chunks, n, vocabulary, width = 64, 32, 24, 48
    place = kernels if plain else kernels_cpu
    monkeypatch.setattr(place, "HEAD_LOGITS", n * vocabulary)
    monkeypatch.setattr(module, "ROUND", n)
    torch.manual_seed(0)
    hidden, head = torch.randn(n_chunks * n, width).bfloat16(), nn.Linear(width, vocabulary, bias=False).bfloat16()
    targets = torch.zeros(n_chunks * n, dtype=torch.long)  # always the same token: the gradients of its row add up
    hidden += 1
    chunks: list[int] = []
    head.register_forward_hook(lambda _, args, output: chunks.append(len(args[0])))
    module.head_loss(hidden, head, targets, torch.arange(len(targets))).backward()
    assert chunks == [n] * n_chunks

    exact = nn.Linear(width, vocabulary, bias=False)
    exact.load_state_dict({"weight": head.weight.detach().float()})
    F.cross_entropy(exact(hidden.float()), targets, reduction="sum").backward()
    assert head.weight.grad.dtype == torch.bfloat16
    difference = (head.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm()
    rounding = (exact.weight.grad.bfloat16() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert difference < 1.5 * rounding, (difference, rounding)


def test_a_gpu_computes_more_logits_at_once(monkeypatch):
    hidden = torch.zeros(1, 1)
    monkeypatch.setattr(kernels, "enabled", True)
    assert kernels.logits_at_once(hidden) == 2**24
    monkeypatch.setattr(kernels, "enabled", False)
    assert kernels.logits_at_once(hidden) == 2**27
