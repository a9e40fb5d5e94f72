"""The chunked loss is the plain one, in value and in gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from litgpt.data.batches import UNTRAINED
from litgpt.methods.lora import LoRA, LoRALinear
from litgpt.model import kernels_cpu
from litgpt.train import loss as module


@pytest.mark.parametrize("kind", ["frozen", "trained", "bias", "lora"])
@pytest.mark.parametrize("positions", [0, 1, 7, 50])
def test_head_loss(kind, positions, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 7 * 11)  # seven positions at once ...
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
