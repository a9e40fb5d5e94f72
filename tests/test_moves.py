"""Nothing of a model stays behind when it is moved, cast or copied, in or outside of its parameters."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.generate.adapters import AdaptedLinear, Adapters
from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2, Prefix
from litgpt.methods.lora import LoRA, LoRALinear
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model.gpt import GPT
from tests.families import FAMILIES, save_random

CPU = torch.device("cpu")
IDS = torch.randint(1, 190, (1, 12), generator=torch.Generator().manual_seed(1))


def several_adapters(model: GPT) -> None:
    model.requires_grad_(False)
    adapters = Adapters()
    for block in model.transformer.h:
        layer = AdaptedLinear(block.attn.proj, adapters)
        for name, variant in (("a", "lora"), ("b", "dora")):
            layer.updates[name] = LoRALinear(block.attn.proj, LoRA(r=2, dropout=0.0, variant=variant))
        block.attn.proj = layer


def prefix_of_litgpt(model: GPT) -> None:
    LLaMAAdapter(2, 1).apply(model)
    for module in model.modules():
        if isinstance(module, Prefix):
            module.order = torch.arange(sum(model.config.qkv_sizes)).flip(0)


EVERYWHERE: dict[str, Any] = {"r": 2, "dropout": 0.0, "key": True, "projection": True, "mlp": True}
METHODS: dict[str, Callable[[GPT], None]] = {
    "full": lambda model: None,
    "lora": LoRA(**EVERYWHERE).apply,
    "dora": LoRA(**EVERYWHERE, variant="dora").apply,
    "pissa": LoRA(**EVERYWHERE, init="pissa").apply,
    "adapter": LLaMAAdapter(2, 1).apply,
    "adapter of litgpt": prefix_of_litgpt,
    "adapter_v2": LLaMAAdapterV2(2, 1).apply,
    "several": several_adapters,
}
SCHEMES = [None, "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
CASES = [
    (method, scheme) for method in METHODS for scheme in SCHEMES if scheme is None or method not in ("full", "pissa")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three ropes: the usual one, one that switches, and two beside each other."""
    names = {"llama": None, "phi3": "longrope", "gemma3_text": None}
    return {
        name: save_random(tmp_path_factory.mktemp("m") / name, name, variant or next(iter(FAMILIES[name])))
        for name, variant in names.items()
    }


@pytest.fixture
def make(folders):
    def made(method: str, scheme: str | None, family: str = "llama") -> GPT:
        if scheme:
            pytest.importorskip("bitsandbytes")
        checkpoint = Checkpoint(folders[family])
        with torch.device("meta"):
            model = GPT(checkpoint.config)
        if scheme:
            quantize(model, scheme, CPU)
        METHODS[method](model)
        torch.manual_seed(0)
        load_weights(model, checkpoint, torch.float32, CPU)
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                for update in module.updates.values():
                    for leaf, p in list(update.named_parameters(recurse=False)):
                        setattr(update, leaf, nn.Parameter(torch.empty(p.shape)))
                    update.reset_parameters()
        for name, p in model.named_parameters():
            if name.endswith(("lora_B", "gate")):
                nn.init.normal_(p, std=0.1)
        answer(model)  # what is kept for later is there
        return model.eval()

    return made


@torch.no_grad()
def answer(model: GPT) -> torch.Tensor:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.adapters.choose(["a", None, "b"], [4, 3, 5], torch.device("cpu"))
    return model(IDS.to(model.device), seqlens=[4, 3, 5])


def tensors(value: Any, seen: set[int], path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All that can be reached, in modules and in objects of any other kind."""
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, torch.dtype, torch.device)):
        return
    seen.add(id(value))
    if torch.is_tensor(value):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, seen, f"{path}.{key}")
    elif isinstance(value, (list, tuple, set)):
        for i, inner in enumerate(value):
            yield from tensors(inner, seen, f"{path}[{i}]")
    elif (hasattr(value, "__dict__") and not callable(value)) or isinstance(value, nn.Module):
        yield from tensors(vars(value), seen, path)


def reachable(model: GPT) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.adapters.choose([], [], torch.device("cpu"))  # of the next pass alone
    return dict(tensors(model, set(), ""))


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_nothing_stays_behind(method, scheme, make):
    model = make(method, scheme)
    names = set(model.state_dict())
    assert {path for path, t in reachable(model).items() if t.is_meta} == set()
    assert len(reachable(model)) >= len(dict(model.named_parameters()))
    model.to("meta")
    assert {path for path, t in reachable(model).items() if not t.is_meta} == set()
    assert set(model.state_dict()) == names == set(dict(model.named_parameters(remove_duplicate=False)))


@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])
def test_other_ropes(family, make):
    model = make("full", None, family)
    expected = answer(model)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    assert all(t.is_meta for t in reachable(model.to("meta")).values())
    model.to_empty(device="cpu").load_state_dict(weights)
    model.tie_weights()
    assert torch.equal(answer(model), expected)  # ropes are in no state_dict
    kept = [rope.inverse for rope in model.to(torch.bfloat16).ropes]
    assert all(inverse.dtype == torch.float32 for inverse in kept)


@pytest.mark.parametrize(("method", "scheme"), CASES)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_another_dtype(method, scheme, cast, make):
    model = make(method, scheme)
    expected = answer(model)
    stored = {path: t.dtype for path, t in reachable(model).items() if ".stored" in path}
    getattr(model, cast)()
    now = {path: t.dtype for path, t in reachable(model).items() if ".stored" in path}
    assert now == stored, "packed weights and their scales are what they are"
    close = {"bfloat16": 0.1, "half": 0.05, "double": 1e-3 if scheme is None else 0.05}[cast]
    if cast == "double" and scheme is not None:
        return  # no kernel takes it
    found = answer(model)
    assert found.dtype == model.dtype and (found - expected).norm() < close * expected.norm()
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            assert layer.dequantized().dtype in (model.dtype, torch.float32)
        if isinstance(layer, LoRALinear) and layer.start is not None:
            assert layer.start[0].dtype == layer.lora_A.dtype


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_a_copy_is_of_its_own(method, scheme, make):
    model = make(method, scheme)
    expected = answer(model)
    other = copy.deepcopy(model)
    assert torch.equal(answer(other), expected)
    shared = {t.data_ptr() for t in reachable(model).values() if t.numel()}
    shared &= {t.data_ptr() for t in reachable(other).values() if t.numel()}
    assert not shared
    other.to("meta")
    assert torch.equal(answer(model), expected)


def norms(layer: LoRALinear) -> torch.Tensor:
    weight = torch.cat([w for w, on in zip(layer_weight(layer).split(list(layer.sizes)), layer.adapted) if on])
    delta = torch.cat([b @ a for _, a, b in layer.blocks()])
    return (weight + layer.lora.scaling * delta).norm(dim=1)


def layer_weight(layer: LoRALinear) -> torch.Tensor:
    quantized = isinstance(layer.linear, QuantizedLinear)
    return layer.linear.dequantized() if quantized else layer.linear.weight  # type: ignore[operator,return-value]


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("change", ["in place", "another", "load_state_dict", "optimizer"])
def test_norms_follow_the_frozen_weight(scheme, change, make):
    """DoRA keeps the norms of the rows of a weight that it takes for frozen."""
    layer = next(m for m in make("dora", scheme).modules() if isinstance(m, LoRALinear))
    assert torch.allclose(layer.row_norms(), norms(layer), rtol=1e-3)
    kept = layer.squares
    layer.row_norms()
    assert layer.squares is kept, "nothing changed, and they were made again"
    linear, weight = layer.linear, 2 * layer_weight(layer) + 0.1
    if scheme is not None:
        for part, rows in enumerate(weight.split(list(linear.parts))):
            linear.store(part, rows)
    elif change == "in place":
        linear.weight.copy_(weight)
    elif change == "another":
        linear.weight = nn.Parameter(weight, requires_grad=False)
    elif change == "load_state_dict":
        linear.load_state_dict({"weight": weight}, strict=False)
    else:
        linear.weight.requires_grad_(True).grad = torch.ones_like(weight)
        torch.optim.SGD([linear.weight], lr=0.3).step()
    assert torch.allclose(layer.row_norms(), norms(layer), rtol=1e-3)
