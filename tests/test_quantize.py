"""Quantized layers under every update, by the autograd function that bitsandbytes takes on CUDA.

Shapes: 2 rows of 5 tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.data.batches import Batch
from litgpt.generate.adapters import AdaptedLinear, Adapters
from litgpt.methods.adapter import AdapterV2Linear, LLaMAAdapter, LLaMAAdapterV2, Prefix
from litgpt.methods.lora import LoRA, LoRALinear
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model.gpt import GPT
from litgpt.train.loss import LossModel
from tests.families import FAMILIES, save_random
from tests.test_training import files, finetune, losses, reference  # noqa: F401

bitsandbytes = pytest.importorskip("bitsandbytes")
functions = pytest.importorskip("bitsandbytes.autograd._functions")

SCHEMES = ["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "dropout": {"dropout": 0.5},
}


@pytest.fixture
def as_on_cuda(monkeypatch):
    """8 bits are multiplied by `MatMul8bitLt`, also in training. On a CPU another function would be taken."""

    def matmul(A, B, out=None, state=None, threshold=0.0, bias=None):
        return functions.MatMul8bitLt.apply(A, B, out, bias, state)

    monkeypatch.setattr(bitsandbytes, "matmul", matmul)


def quantized(scheme: str, parts: tuple[int, ...], bias: bool, n_in: int = 64) -> QuantizedLinear:
    torch.manual_seed(3)
    linear = nn.Linear(n_in, sum(parts), bias=bias, device="meta")
    linear.parts = parts  # type: ignore[assignment]
    layer = QuantizedLinear(linear, scheme)
    for i, rows in enumerate(parts):
        layer.store(i, torch.randn(rows, n_in) / 8)
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # says where updates are to be
    if bias:
        layer.bias = nn.Parameter(torch.randn(sum(parts)), requires_grad=False)
    return layer


def base_output(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """What the library makes of flat inputs, as a constant."""
    with torch.no_grad():
        parts = [layer.matmul(x.flatten(0, -2), *stored) for stored in layer.stored]
        return (torch.cat(parts, dim=-1) + (0 if layer.bias is None else layer.bias)).unflatten(0, x.shape[:-1])


def formula(layer: LoRALinear, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What an update adds up to, block by block. The base's gradient is that of its dequantized weight."""
    weight, s = layer.linear.dequantized(), layer.lora.scaling
    exact = x @ weight.t()
    base = exact + (base - exact).detach()  # the value of one, the gradient of the other
    bias = 0 if layer.linear.bias is None else layer.linear.bias
    y, blocks, start = [], {i: (a, b) for i, a, b in layer.blocks()}, 0
    magnitudes = iter(() if layer.magnitude is None else layer.magnitude.split(layer.adapted_sizes))
    for i, size in enumerate(layer.sizes):
        rows = slice(start, start + size)
        part, start = base[..., rows], start + size
        if i in blocks:
            a, b = blocks[i]
            if layer.magnitude is None:
                part = part + s * (x @ a.t() @ b.t())
            else:
                own = 0 if layer.linear.bias is None else bias[rows]
                ratio = next(magnitudes) / (weight[rows] + s * b @ a).norm(dim=1).detach()
                part = own + ratio * (part - own + s * (x @ a.t() @ b.t()))
        y.append(part)
    return torch.cat(y, dim=-1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("parts", [(64,), (64, 32, 32)], ids=["one part", "fused"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("first", [False, True], ids=["", "first layer"])  # whose inputs want no gradient
def test_an_update_of_a_quantized_layer(scheme, variant, parts, bias, first, as_on_cuda):
    linear = quantized(scheme, parts, bias)
    adapted = [True] if len(parts) == 1 else [True, False, True]
    layer = LoRALinear(linear, LoRA(**{"r": 4, "dropout": 0.0} | VARIANTS[variant]), adapted)
    nn.init.normal_(layer.lora_B, std=0.1)
    layer.train(variant == "dropout")  # of which only is asked that it runs
    x = torch.randn(2, 5, 64, requires_grad=not first)
    y = layer(x)
    y.square().sum().backward()
    if variant == "dropout":
        assert y.shape == (2, 5, sum(parts)) and layer.lora_A.grad.isfinite().all()
        return
    found = [y.detach(), layer.lora_A.grad, layer.lora_B.grad, *([] if first else [x.grad])]
    found += [layer.magnitude.grad] if layer.magnitude is not None else []
    weights = [p for p in (layer.lora_A, layer.lora_B, layer.magnitude) if p is not None]
    other = x.detach().clone().requires_grad_(True)
    expected = formula(layer, other, base_output(linear, x))
    grads = torch.autograd.grad(expected.square().sum(), [*weights[:2], other, *weights[2:]])
    wanted = [expected.detach(), *(g for i, g in enumerate(grads) if not (first and i == 2))]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("x", [torch.ones(2, 5, 64), torch.ones(5, 64), torch.ones(64), torch.ones(0, 64)])
def test_nothing_is_copied(scheme, x, as_on_cuda, monkeypatch):
    """What the library returns is what the update is added to, and what is returned; no view of it, either."""
    made: list[torch.Tensor] = []
    product = QuantizedLinear.matmul

    def watched(self, *args):
        made.append(product(self, *args))
        return made[-1]

    monkeypatch.setattr(QuantizedLinear, "matmul", watched)
    layer = LoRALinear(quantized(scheme, (32,), bias=False), LoRA(dropout=0.0))
    y = layer(x.clone().requires_grad_(True))
    assert y.shape == (*x.shape[:-1], 32) and not y._is_view()
    assert y.data_ptr() == made[0].data_ptr()
    y.sum().backward()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_other_methods_of_a_quantized_layer(scheme, bias, as_on_cuda):
    linear = quantized(scheme, (64, 32, 32), bias)
    x = torch.randn(2, 5, 64, requires_grad=True)
    scaled = AdapterV2Linear(linear)
    nn.init.normal_(scaled.adapter_bias)
    nn.init.normal_(scaled.adapter_scale)
    y = scaled(x)
    y.sum().backward()
    assert torch.allclose(y, scaled.adapter_scale * (base_output(linear, x) + scaled.adapter_bias), atol=1e-4)
    assert torch.allclose(scaled.adapter_bias.grad, 10 * scaled.adapter_scale, rtol=1e-4)
    prefix = Prefix(3, 64, 4, 0.25, torch.device("cpu"))
    nn.init.ones_(prefix.gate)
    q = torch.randn(2, 4, 5, 16, requires_grad=True)
    prefix(q, linear, (64, 32, 32)).sum().backward()
    assert prefix.embedding.grad.isfinite().all() and prefix.embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_several_adapters_of_a_quantized_layer(scheme, as_on_cuda):
    linear = quantized(scheme, (32,), bias=False)
    adapters = Adapters()
    layer = AdaptedLinear(linear, adapters)
    for name, variant in (("a", "lora"), ("b", "dora")):
        layer.updates[name] = LoRALinear(linear, LoRA(dropout=0.0, variant=variant)).eval()
        nn.init.normal_(layer.updates[name].lora_B)
    x = torch.randn(1, 6, 64)
    adapters.choose(["a", None, "b"], [3, 1, 2], torch.device("cpu"))
    with torch.no_grad():
        together = layer(x)
        base = base_output(linear, x)
        for name, at in (("a", slice(0, 3)), ("b", slice(4, 6))):
            assert torch.allclose(together[:, at], formula(layer.updates[name], x, base)[:, at], atol=2e-3)
        assert torch.equal(together[:, 3], base[:, 3])


def test_loss_curve_of_peft_as_on_cuda(llama, files, tmp_path, as_on_cuda):  # noqa: F811
    """Both multiply by the same function; the layer of several parts, and those of one."""
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    flags = ["--quantize", "bnb.int8", "--train.epochs", 10, "--lora_projection", "true", "--lora_mlp", "true"]
    finetune(llama, files, tmp_path / "start", *flags, "--train.max_steps", 1, "--optimizer.lr", 1e-30)
    expected = reference(llama, files, tmp_path / "start" / "final", targets, "bnb.int8")
    curve = losses(finetune(llama, files, tmp_path / "out", "--train.micro_batch_size", 3, *flags))
    assert curve == pytest.approx(expected, abs=2e-2) and expected[-1] < expected[0] - 0.5


def made(folder: Path, scheme: str | None, apply: Callable[[GPT], None]) -> GPT:
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    if scheme:
        quantize(model, scheme, torch.device("cpu"))
    apply(model)
    load_weights(model, checkpoint, torch.float32, torch.device("cpu"))
    return model.train()


def gradients(model: GPT, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    LossModel(model)(Batch(ids, ids.roll(-1, dims=1), [10, 14], 24)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "falcon", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("method", ["lora", "dora", "adapter", "adapter_v2"])
def test_a_step_of_each_family_and_method_as_on_cuda(model_type, method, tmp_path, as_on_cuda):
    """Every linear layer is updated; the gradient of each trained weight is close to that of the same model with the
    weights that the 8 bits stand for."""
    folder = save_random(tmp_path / "m", model_type, next(iter(FAMILIES[model_type])))
    mlp = model_type != "mixtral" or method != "dora"  # DoRA is not for experts
    lora = LoRA(r=2, dropout=0.0, key=True, projection=True, mlp=mlp, variant="dora" if method == "dora" else "lora")
    apply = {"adapter": LLaMAAdapter(2, 1), "adapter_v2": LLaMAAdapterV2(2, 1)}.get(method, lora).apply
    model, exact = (made(folder, scheme, apply) for scheme in ("bnb.int8", None))
    for name, p in model.named_parameters():
        if name.endswith(("lora_B", "gate")):
            nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        trained = dict(exact.named_parameters())
        for name, p in model.named_parameters():
            if p.requires_grad:
                trained[name].copy_(p)
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                exact.get_submodule(name).weight.copy_(layer.dequantized())
    ids = torch.randint(1, 190, (1, 24), generator=torch.Generator().manual_seed(1))
    ours, theirs = gradients(model, ids), gradients(exact, ids)
    assert ours.keys() == theirs.keys() and len(ours) > 3
    a, b = (torch.cat([grads[name].flatten() for name in theirs]) for grads in (ours, theirs))
    assert a @ b > 0.97 * a.norm() * b.norm() and (a - b).norm() < 0.25 * b.norm()
