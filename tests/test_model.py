"""The model is the one of `transformers`: logits, gradients, greedy text, documents end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.generate.engine import generate
from litgpt.methods.model_source import ModelSource
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.kernels_cpu import NORM_SIZE
from litgpt.model.kv_cache import KVCache
from litgpt.model.norm import RMSNorm, UnitOffsetRMSNorm
from litgpt.model.packing import Packing
from litgpt.model.rope import apply_rope, make_ropes
from tests.conftest import save_llama

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 12},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "odd sizes": {"vocab_size": 317, "intermediate_size": 37, "rms_norm_eps": 1e-3},
}


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    return save_llama(tmp_path_factory.mktemp("m") / "model", tokenizer_file, **VARIANTS[request.param])


def both(folder: Path) -> tuple[torch.nn.Module, GPT]:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return theirs.eval(), ModelSource.open(folder).model(torch.float32, CPU)


def random_ids(n: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(2, 300, (rows, n), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def test_logits(folder):
    theirs, ours = both(folder)
    ids = random_ids(200, rows=2)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_documents_do_not_see_each_other(folder):
    theirs, ours = both(folder)
    lengths = [1, 17, 5, 60]
    ids = random_ids(sum(lengths))
    expected = torch.cat([theirs(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    actual = ours(ids, seqlens=lengths)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_cache_grows_in_blocks(folder):
    config = both(folder)[1].config
    cache = KVCache(replace(config, block_size=1024))
    written = torch.randn(1, 2, 700, 4)
    for part in written.split([3, 300, 1, 396], dim=2):
        keys, values = cache.append(0, 1, part, -part)
        cache.advance([1], [part.size(2)])
    assert torch.equal(keys, written) and torch.equal(values, -written)
    stored = cache.layers[0]
    assert stored is not None and stored[0].shape == (2, 2, 768, 4)
    cache.append(0, 0, written[:, :, :5], written[:, :, :5])
    cache.advance([0], [5])
    assert cache.keep(1, 600) == 600 and cache.keep(0, 9) == 5
    cache.copy(1, [0])
    keys, _ = cache.append(0, 0, written[:, :, :1], written[:, :, :1])
    assert torch.equal(keys[:, :, :600], written[:, :, :600]) and keys.size(2) == 601


def test_greedy_text(folder):
    theirs, ours = both(folder)
    ids = random_ids(20)
    expected = theirs.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)[0, 20:]
    assert list(generate(ours, ids[0].tolist(), 40)) == expected.tolist()


def test_gradients(folder):
    theirs, ours = both(folder)
    ids = random_ids(50)
    ours.requires_grad_(True)
    for model in (theirs, ours):
        logits = model(ids).logits if model is theirs else model(ids)
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    from litgpt.families import weight_map

    seen = set()
    for parameter in weight_map(ours.config).parameters(ours).values():
        for tensor in parameter.tensors:
            if tensor.name in expected:
                seen.add(tensor.name)
                scale = float(expected[tensor.name].abs().max())
                grad = parameter.value.grad[tensor.rows]
                torch.testing.assert_close(grad, expected[tensor.name], rtol=0, atol=1e-4 * scale)
    assert seen == set(expected)


def test_shards(tmp_path, tokenizer_file):
    one = save_llama(tmp_path / "one", tokenizer_file)
    many = save_llama(tmp_path / "many", tokenizer_file, shards=True)
    assert len(list(many.glob("*.safetensors"))) > 3
    a, b = (ModelSource.open(f).model(torch.float32, CPU).state_dict() for f in (one, many))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_old_rope_fields(tmp_path, tokenizer_file):
    """`rope_theta` and `rope_scaling`, as folders from before transformers 5 have them."""
    folder = save_llama(tmp_path / "m", tokenizer_file, rope_parameters=LLAMA3)
    fields = json.loads((folder / "config.json").read_text())
    numbers = fields.pop("rope_parameters")
    fields["rope_theta"] = numbers.pop("rope_theta")
    new = Checkpoint(folder).config
    (folder / "config.json").write_text(json.dumps(fields | {"rope_scaling": numbers}))
    assert Checkpoint(folder).config == new
    (folder / "config.json").write_text(json.dumps(fields | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert Checkpoint(folder).config.rope_type == "linear"


def test_loading_casts_each_weight(llama):
    with torch.device("meta"):
        model = GPT(Checkpoint(llama).config)
    load_weights(model, Checkpoint(llama), torch.bfloat16, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in model.parameters())


@torch.no_grad()
def test_real_model(real_data):
    folder = real_data / "models" / "stories260k"
    theirs, ours = both(folder)
    ids = random_ids(500)
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_on_a_cpu(dtype):
    draw = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(s, generator=draw).to(dtype) for s in ((2, 90, 128), (128,), (2, 90, 128)))
    x = (3 * x).requires_grad_()
    assert x.numel() >= NORM_SIZE
    for offset, norm in ((0, RMSNorm(128, 1e-3)), (1, UnitOffsetRMSNorm(128, 1e-3))):
        norm.weight.data = weight.clone()
        y = norm(x)
        expected = torch.nn.functional.rms_norm(x.double(), (128,), weight.double() + offset, 1e-3)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.08 if dtype == torch.bfloat16 else 1e-5)
        found = torch.autograd.grad(y, [x, norm.weight], grad)
        w = weight.double().requires_grad_()
        again = torch.nn.functional.rms_norm(x.double(), (128,), w + offset, 1e-3)
        for a, b in zip(found, torch.autograd.grad(again, [x, w], grad.double())):
            scale = float(b.abs().max())
            torch.testing.assert_close(
                a.double(), b.double(), rtol=0, atol=scale * (1e-2 if a.dtype != torch.float32 else 1e-6)
            )


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])  # the last one rotates an odd number of dimensions
def test_neighbors_that_rotate(share):
    """The same as halves that rotate, after the dimensions of each head are sorted."""
    config = Config(n_layer=1, n_embd=20, n_head=2, head_size=10, rotary_percentage=share)
    x, packing = torch.randn(1, 7, 3, 10), Packing.of([4, 3], [0, 5])
    tables = []
    for interleave in (True, False):
        (rope,) = make_ropes(replace(config, rope_interleave=interleave))
        tables.append(rope.table(packing.positions, packing.seqlens, [4, 8], x.dtype))
    size = tables[0][0].size(-1)
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2), torch.arange(size, 10)])
    neighbors = apply_rope(x, *tables[0], True)
    assert torch.equal(neighbors[..., order], apply_rope(x[..., order], *tables[1]))
    assert not torch.allclose(neighbors, apply_rope(x, *tables[1]))


def test_the_order_of_weights():
    """Random numbers and the state of an optimizer follow it, so a run of an earlier version resumes only with it."""
    with torch.device("meta"):
        block = GPT(Config(n_layer=1, n_embd=32, n_head=4, norm_qk=True)).transformer.h[0]
    names = [name.removesuffix(".weight") for name, _ in block.named_parameters()]
    assert names == ["norm_1", "attn.qkv", "attn.proj", "attn.norm_q", "attn.norm_k", "norm_2", "mlp.fc", "mlp.proj"]
