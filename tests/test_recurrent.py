"""Recurrent layers: chunks against single tokens, documents that lie end to end, and the cache of states."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from litgpt.data.batches import Batch
from litgpt.generate.engine import Engine, Request
from litgpt.generate.sampling import Sampling
from litgpt.generate.speculative import Speculation
from litgpt.model import delta_rule, kernels, state_space
from litgpt.model.gpt import GPT, RECURRENT
from litgpt.model.kv_cache import KVCache
from litgpt.model.packing import Packing
from litgpt.model.recurrent import CausalConv, RecurrentLayer
from litgpt.train.loss import LossModel
from tests.families import save_random
from tests.test_families import assert_close, ids, ours

LENGTHS = [1, 3, 58, 76, 2, 1, 130, 300]  # with a border just before the end of a chunk
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
MODELS = {  # one of each kind, and one to draft for it
    "GatedDeltaNet": ("qwen3_5_text", "plain", "tied"),
    "ShortConv": ("lfm2", "plain", "biases"),
    "Mamba2": ("granitemoehybrid", "mamba", "mamba biases"),
}
Rule = tuple[Callable[..., tuple], Callable[..., tuple], list[torch.Tensor], tuple[int, ...]]


@pytest.fixture(scope="module", params=MODELS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model_type, *variants = MODELS[request.param]
    return [save_random(tmp_path_factory.mktemp("m") / "model", model_type, variant) for variant in variants]


@pytest.fixture(scope="module")
def model(folders: list[Path]) -> GPT:
    return ours(folders[0])


def rule(kind: str, total: int, dtype: torch.dtype = torch.float64) -> Rule:
    """The function for chunks and that for one token, their inputs, with strong and weak decays, and the shape of the
    state."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, total, *shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [drawn(2, 8), drawn(2, 8), drawn(4, 6), -4 * drawn(4) ** 4]
    tensors[3][..., 0] /= 1000  # a head that remembers
    if kind == "Mamba2":  # with queries and keys of length 1, as those of the delta rule become
        tensors[:2] = (torch.nn.functional.normalize(x, dim=-1) for x in tensors[:2])
        return state_space.state_space, state_space.one_token, tensors, (1, 2, 8, 2, 6)
    return delta_rule.delta_rule, delta_rule.one_token, [*tensors, drawn(4).sigmoid()], (1, 4, 8, 6)


def test_every_kind_is_tested():
    assert MODELS.keys() == RECURRENT.keys()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("total", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("kind", ["GatedDeltaNet", "Mamba2"])
def test_chunks_are_single_tokens(kind, total, dtype):
    scan, one_token, tensors, shape = rule(kind, total, dtype)
    state, outputs = torch.zeros(shape, dtype=dtype), []
    for t in range(total):
        y, state = one_token(*(x[:, t : t + 1] for x in tensors), state)
        outputs.append(y)
    whole, last = scan(*tensors)
    torch.testing.assert_close(whole, torch.cat(outputs, dim=1), rtol=0, atol=BOUNDS[dtype])
    torch.testing.assert_close(last, state, rtol=0, atol=BOUNDS[dtype])
    first = total // 3
    y, state = scan(*(x[:, :first] for x in tensors)) if first else (whole[:, :0], torch.zeros_like(last))
    rest, state = scan(*(x[:, first:] for x in tensors), None, state)
    torch.testing.assert_close(torch.cat([y, rest], dim=1), whole, rtol=0, atol=BOUNDS[dtype])


@pytest.mark.parametrize("kind", ["GatedDeltaNet", "Mamba2"])
def test_a_document_does_not_see_the_one_before(kind):
    """Outputs and gradients are those of each document alone."""
    scan, _, tensors, _ = rule(kind, sum(LENGTHS))
    tensors = [x.requires_grad_() for x in tensors]
    weights = torch.randn(1, sum(LENGTHS), 4, 6, dtype=torch.float64)
    alone = torch.cat([scan(*parts)[0] for parts in zip(*(x.split(LENGTHS, dim=1) for x in tensors))], dim=1)
    packed, _ = scan(*tensors, Packing.of(LENGTHS))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    wanted, found = (torch.autograd.grad((y * weights).sum(), tensors) for y in (alone, packed))
    for a, b in zip(wanted, found):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_mamba_is_its_definition():
    """Each token attends to the earlier ones, whose share decays with every token in between."""
    scan, _, (q, k, v, decay), _ = rule("Mamba2", 100)
    since = decay.cumsum(1).transpose(1, 2)  # (1, H, T)
    shares = (since[..., :, None] - since[..., None, :]).exp().tril()
    scores = torch.einsum("btgk,bsgk->bgts", q, k).repeat_interleave(2, dim=1)
    expected = torch.einsum("bhts,bshv->bthv", scores * shares.nan_to_num(0, 0, 0), v)
    torch.testing.assert_close(scan(q, k, v, decay)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_convolution_continues(size):
    conv, x = CausalConv(5, size, bias=True), torch.randn(2, 20, 5)
    conv.reset_parameters()
    whole = conv(x, torch.arange(20))
    expected = torch.nn.functional.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding=size - 1, groups=5)
    torch.testing.assert_close(whole, expected[..., :20].transpose(1, 2))
    tail, outputs = torch.zeros(2, size - 1, 5), []
    for part in x.split([1, 2, 10, 1, 6], dim=1):
        y, tail = conv.continued(part, tail)
        assert tail.shape == (2, size - 1, 5)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 1, 2, 1, 60]])
def test_packed_documents_train_as_single_ones(model, lengths):
    """The loss, and the gradient of every weight."""
    loss_model = LossModel(model.requires_grad_(True))
    parts = ids(sum(lengths)).split(lengths, dim=1)

    def gradients(batches: list[tuple[torch.Tensor, list[int]]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for tokens, seqlens in batches:
            ends = torch.tensor([end - 1 for end in itertools.accumulate(seqlens)])
            targets = tokens.roll(-1, 1).index_fill(1, ends, -100)
            loss = loss_model(Batch(tokens, targets, seqlens, int((targets >= 0).sum())))
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, packed = gradients([(torch.cat(parts, dim=1), lengths)])
    single, each = gradients([(part, [part.size(1)]) for part in parts if part.size(1) > 1])
    assert whole == pytest.approx(single, rel=1e-5)
    for name, grad in packed.items():
        assert_close(grad, each[name], 1e-4)


@torch.no_grad()
def test_rows_go_back_to_snapshots(model):
    """A row that is truncated has the states of a snapshot; a copy has those of its source."""
    text = ids(60)
    cache = KVCache(model.config)
    for start, end in ((0, 20), (20, 50), (50, 51)):
        model(text[:, start:end], [end - start], cache, [0])
    cache.copy(0, [1, 2])
    assert [cache.keep(0, n) for n in (51, 49, 20, 19)] == [51, 20, 20, 0]
    assert cache.keep(1, 30) == 20
    expected = model(text)
    assert_close(model(text, [60], cache, [0]), expected, 1e-4)
    assert_close(model(text[:, 20:], [40], cache, [1]), expected[:, 20:], 1e-4)
    assert_close(model(text[:, 51:], [9], cache, [2]), expected[:, 51:], 1e-4)


def test_many_answers_at_once(model):
    """Rows that become free, prompts that share their beginning, and prompts that are read in chunks."""
    shared = ids(30)[0].tolist()
    prompts = [[*shared[: 5 * i + 1], *ids(i + 1)[0].tolist()] for i in range(6)] + [ids(400)[0].tolist(), shared]
    alone = [next(Engine(model, rows=1).run([Request(prompt, 12)])).ids for prompt in prompts]
    engine = Engine(model, rows=3)
    for _ in range(2):  # the second time on top of what the first left
        found = {
            request.tag: request.ids for request in engine.run(Request(p, 12, tag=i) for i, p in enumerate(prompts))
        }
        assert [found[i] for i in range(len(prompts))] == alone


def test_rejected_drafts(model, folders):
    prompt = ids(40)[0].tolist()
    expected = next(Engine(model, rows=1).run([Request(prompt, 20)])).ids
    request = Request(prompt, 20, Sampling(temperature=0.0))
    *_, last = Speculation(model, ours(folders[1])).grow([request])
    assert last.ids == expected


def test_a_batch_of_rows_without_packing(model):
    batch = ids(40, rows=2)
    assert_close(model(batch), torch.cat([model(row[None]) for row in batch]), 1e-5)
    assert any(isinstance(block.attn, RecurrentLayer) for block in model.transformer.h)


@torch.no_grad()
def test_limits_of_steps(tmp_path):
    """Those of transformers where it does not decode; ours are the same where we decode."""
    folder = save_random(tmp_path / "m", "granitemoehybrid", "mamba", changes={"time_step_limit": [0.4, 0.7]})
    model, text = ours(folder), ids(80)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = reference(text, use_cache=False).logits
    assert_close(model(text), expected, 1e-4)
    cache, parts = KVCache(model.config), text.split([20, 1, 1, 58], dim=1)
    assert_close(torch.cat([model(part, [part.size(1)], cache, [0]) for part in parts], dim=1), expected, 1e-4)


def test_the_kernel_of_flash_linear_attention(monkeypatch):
    """What it is called with: sequences that lie end to end, or rows, and the states."""
    calls = []

    def kernel(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens):
        calls.append((initial_state, cu_seqlens))
        return v, initial_state

    monkeypatch.setattr(delta_rule, "fla_kernel", lambda: kernel)
    monkeypatch.setattr(kernels, "enabled", False)
    scan, _, tensors, _ = rule("GatedDeltaNet", 9, torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    scan(*tensors, Packing.of([4, 5]))
    scan(*(x.expand(2, *x.shape[1:]) for x in tensors), Packing.of([9]))
    scan(*tensors, None, "states")
    assert calls[0][1].tolist() == [0, 4, 9] and calls[0][1].dtype == torch.int64
    assert calls[1] == (None, None) and calls[2] == ("states", None)


def test_the_path_of_a_gpu_computes_again(model, monkeypatch):
    monkeypatch.setattr(kernels, "enabled", False)
    test_packed_documents_train_as_single_ones(model, [7, 1, 2, 1, 60])
