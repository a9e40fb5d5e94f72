"""What is kept for the backward pass, and that what is computed again is the same."""

import dataclasses
import gc
from contextlib import nullcontext
from functools import cache
from typing import Any, Optional

import pytest
import torch
from torch.nn import functional as F

from litgpt.families import read_config
from litgpt.methods.adapter import LLaMAAdapterV2
from litgpt.methods.lora import LoRA
from litgpt.model import kernels, rematerialize
from litgpt.model.blocks import Offload, compile_blocks, recompute
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.train.loss import LossModel
from tests.families import FAMILIES
from tests.meter import kept
from tests.test_blocks import batches, compiler  # noqa: F401
from tests.test_gpu_path import EVERYWHERE

TOKENS = 256
METHODS: dict[str, tuple[Optional[LoRA], Optional[str], Any]] = {
    "full": (None, None, False),
    "LoRA": (LoRA(), None, False),
    "LoRA everywhere": (LoRA(**EVERYWHERE), None, False),  # type: ignore[arg-type]
    "QLoRA": (LoRA(), "bnb.nf4", False),
    "DoRA": (LoRA(variant="dora"), None, False),
    "LoRA, block": (LoRA(), None, True),
    "LoRA, offload": (LoRA(), None, "offload"),
}
# KiB per token and layer on the device, at most
LIMITS = {
    "Llama-3.1-8B": {"full": 94, "LoRA": 94, "LoRA everywhere": 94, "QLoRA": 94, "DoRA": 105, "LoRA, block": 8.1,
                     "LoRA, offload": 0.1},
    "Gemma-2-9b": {"full": 110, "LoRA": 110, "LoRA everywhere": 110, "LoRA, block": 7.1},
    "Qwen3-8B": {"full": 86, "LoRA": 86, "LoRA everywhere": 86, "LoRA, block": 8.1},
}  # fmt: skip


@cache
def per_token_and_layer(name: str, method: str) -> tuple[float, float]:
    """KiB on the device and in the memory of the host: the slope over layers."""
    lora, scheme, checkpointing = METHODS[method]
    config = Config.from_name(name)
    few, many = (kept(dataclasses.replace(config, n_layer=n), lora, scheme, checkpointing, TOKENS) for n in (2, 4))
    device, host = ((b - a) / 2 / TOKENS / 1024 for a, b in zip(few, many))
    return device, host


@pytest.mark.parametrize("name", LIMITS)
def test_kept_for_the_backward_pass(name):
    if name == "Llama-3.1-8B":
        pytest.importorskip("bitsandbytes")
    print(f"\n{name}: KiB per token and layer (on the device, on the host)")
    for method, limit in LIMITS[name].items():
        device, host = per_token_and_layer(name, method)
        print(f"{method:20} {device:7.1f} {host:7.1f}")
        assert device <= limit, method
        assert round(host) == (8 if "offload" in method else 0)


def step(model: GPT, device_type: str = "cpu", autocast: bool = False) -> list[torch.Tensor]:
    """The loss of a batch and all gradients."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast(device_type, torch.bfloat16) if autocast else nullcontext():
        loss = LossModel(model.train())(batches(1)[0])
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def small_model(family: str, variant: str, method: Any = None) -> GPT:
    torch.manual_seed(0)
    model = GPT(read_config({"model_type": family} | FAMILIES[family][variant]))
    model.reset_parameters()
    if method is not None:
        method.apply(model)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "method", [None, LoRA(dropout=0.3, **EVERYWHERE), LoRA(variant="dora", dropout=0.3), LLaMAAdapterV2(start_layer=0)]
)
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(f, v, marks=() if f in ("llama", "qwen3", "gemma2") and i == 0 else pytest.mark.long)
        for f, variants in FAMILIES.items()
        for i, v in enumerate(variants)
    ],
)
def test_gradients_are_equal_bit_for_bit(family, variant, method, autocast, plain_kernels, monkeypatch):
    model = small_model(family, variant, method)
    found = step(model, autocast=autocast)
    monkeypatch.setattr(rematerialize, "run", lambda x, function, *others: function(x, *others))
    for a, b in zip(found, step(model, autocast=autocast), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["block", "offload", "compile"])
def test_together_with(how, plain_kernels, request):
    model = small_model("llama", "plain", LoRA(dropout=0.0, **EVERYWHERE))
    expected = step(model)
    if how == "compile":
        request.getfixturevalue("compiler")
        compile_blocks(model)
    else:
        recompute(model, offload=how == "offload")
    for a, b in zip(step(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_is_torchs(plain_kernels):
    """The share that is dropped, the scale of the rest, and the gradient."""
    torch.manual_seed(0)
    x = torch.ones(300, 300, requires_grad=True)
    y = kernels.dropout(x, 0.3)
    assert set(y.detach().unique().tolist()) == {0.0, F.dropout(torch.ones(50), 0.3).max().item()}
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(kernels.dropout(x, 0.3), y), "another mask each time"


def test_a_recipe_dies_with_its_tensor(plain_kernels):
    """An address that is used again would else get the recipe of another tensor."""
    with rematerialize.rematerialization():
        recipes = rematerialize.recipes
        x = torch.randn(100, 100, requires_grad=True)
        y = kernels.remat(x, torch.square)
        assert recipes and len(recipes) == 1
        z = F.linear(y, torch.eye(100, requires_grad=True))
        del y
        gc.collect()
        assert not recipes, "autograd keeps the recipe instead of the tensor"
        address = torch.randn(100, 100, requires_grad=True)
        w = F.linear(address, torch.eye(100, requires_grad=True))
    (z + w).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_an_input_that_is_overwritten_is_an_error(plain_kernels):
    with rematerialize.rematerialization():
        x = torch.randn(5, requires_grad=True) * 1
        y = kernels.remat(x, torch.square)
        total = (y * torch.ones(5, requires_grad=True)).sum()
        x.add_(1)
    with pytest.raises(RuntimeError, match="overwritten"):
        total.backward()


def test_no_cycles(plain_kernels):
    """Memory of a pass without a backward pass is free at once."""
    model = small_model("llama", "plain", LoRA(**EVERYWHERE))
    gc.collect()
    gc.disable()
    try:
        loss = LossModel(model.train())(batches(1)[0])
        before = sum(torch.is_tensor(o) for o in gc.get_objects())
        again = LossModel(model)(batches(1)[0])
        del loss
        assert sum(torch.is_tensor(o) for o in gc.get_objects()) <= before and again.requires_grad
    finally:
        gc.enable()


def test_offload_keeps_what_is_on_a_cpu():
    with Offload(torch.ones(1)):
        x = torch.randn(4, requires_grad=True)
        y = (x * 2).exp()
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())
