"""A GPU computes what a CPU computes, and both what `transformers` computes.

On a machine with a GPU: `pytest -m gpu tests/test_gpu.py`. With LITGPT_TEST_DEVICE=cpu, a CPU stands for the GPU: it
runs the same code, without the kernels for CPUs.

Models are tiny, with sizes that the fused kernels take. float32 agrees to rounding; bfloat16 agrees in the norm of the
difference.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.data.batches import UNTRAINED, Batch
from litgpt.families import aliases, weight_map
from litgpt.generate import engine as engine_module
from litgpt.generate.adapters import add_adapters
from litgpt.generate.engine import Engine, Request, generate
from litgpt.generate.speculative import Speculation
from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.lora import LoRA
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_export import write_lora
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model import attention_kernels, kernels
from litgpt.model.blocks import recompute
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache
from litgpt.model.mlp import LLaMAMoE
from litgpt.train.loss import LossModel
from litgpt.train.optimizers import AdamW, StochasticRounding, round_stochastically_
from tests.families import save_random
from tests.runs import go, lines, weights
from tests.test_families import find

try:
    import bitsandbytes

    MATMUL = bitsandbytes.matmul
except ImportError:
    bitsandbytes = None

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 256}
VARIANTS = {
    "llama": "plain",
    "gemma2": "plain",
    "qwen3": "windows",
    "mixtral": "window",
    "phi3": "window",
    "gpt_oss": "plain",
}
OWN_SIZES = {"llama": {"head_dim": 16}, "gemma2": {"head_dim": 16}, "qwen3": {"head_dim": 16}}
FAMILIES = [f if f == "llama" else pytest.param(f, marks=pytest.mark.long) for f in VARIANTS]
DTYPES = [torch.float32, torch.bfloat16]
# Largest norm of a difference, relative to the norm of what is expected.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.06}
RESUMED = ("lora", "lora-bf16", "nf4", "full")
EVERYWHERE: dict[str, Any] = {"r": 4, "dropout": 0.0, "key": True, "projection": True, "mlp": True, "head": True}
METHODS: dict[str, tuple[Any, str | None, float]] = {  # the method, the quantization, and how close gradients are
    "lora": (LoRA(**EVERYWHERE), None, 1e-3),
    "nf4": (LoRA(**EVERYWHERE), "bnb.nf4", 1e-2),
    "nf4-dq": (LoRA(**EVERYWHERE), "bnb.nf4-dq", 1e-2),
    "int8": (LoRA(**EVERYWHERE), "bnb.int8", 0.3),  # a GPU rounds the activations too
    "dora": (LoRA(**{**EVERYWHERE, "mlp": False}, variant="dora"), None, 1e-3),
    "dora nf4": (LoRA(**{**EVERYWHERE, "mlp": False}, variant="dora"), "bnb.nf4", 1e-2),
    "adapter": (LLaMAAdapter(4, 1), None, 1e-3),
    "adapter_v2": (LLaMAAdapterV2(4, 1), None, 1e-3),
    "adapter_v2 int8": (LLaMAAdapterV2(4, 1), "bnb.int8", 0.3),
}


def matmul_of_cuda(A: torch.Tensor, B: torch.Tensor, out: Any = None, state: Any = None, **kwargs: Any) -> torch.Tensor:
    """8 bits on CUDA. On a CPU, bitsandbytes trains with another function."""
    return bitsandbytes.autograd._functions.MatMul8bitLt.apply(A, B, out, kwargs.get("bias"), state)


@pytest.fixture
def cpu_as_gpu(plain_kernels: None) -> Iterator[torch.device]:
    """A CPU that runs what a GPU runs."""
    with mock.patch.object(bitsandbytes, "matmul", matmul_of_cuda) if bitsandbytes else nullcontext():
        yield CPU


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if os.environ.get("LITGPT_TEST_DEVICE", "cuda") == "cpu":
        yield request.getfixturevalue("cpu_as_gpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    yield torch.device("cuda", 0)
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # nothing runs in this process anymore; pytest starts another one
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of a family. Read only."""
    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("models") / family
            changes = SIZES | OWN_SIZES.get(family, {})
            # numbers of bfloat16, which float32 reads without a change: quantized, they are the same in both
            made[family] = save_random(path, family, VARIANTS[family], torch.bfloat16, changes=changes)
        return made[family]

    return save


@contextmanager
def reference(own_matmul: bool = True) -> Iterator[None]:
    """A CPU runs its own kernels, also where it stands for a GPU; 8 bits only with `own_matmul`."""
    with (
        mock.patch.object(kernels, "enabled", True),
        mock.patch.object(attention_kernels, "has_varlen", lambda *_: False),
        mock.patch.object(bitsandbytes, "matmul", MATMUL) if bitsandbytes and own_matmul else nullcontext(),
    ):
        yield


def make(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    method: Any = None,
    scheme: str | None = None,
) -> GPT:
    """A model to train. What a method adds has the same numbers on every device, none of them zero."""
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    if scheme is not None:
        quantize(model, scheme, device)
    if method is None:
        model.requires_grad_(True)
    else:
        method.apply(model)
    load_weights(model, checkpoint, dtype, device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters() if method is not None else ():
            if p.requires_grad:
                noise = 0.1 * torch.randn(p.shape, generator=generator).to(p)
                p.copy_(noise) if name.endswith(("lora_A", "embedding")) else p.add_(noise)
    return model.train()


def ids(n: int, seed: int = 0, vocabulary: int = 250) -> torch.Tensor:
    return torch.randint(2, vocabulary, (1, n), generator=torch.Generator().manual_seed(1000 * seed + n))


def make_batch(seqlens: tuple[int, ...] = (33, 1, 50, 8), vocabulary: int = 250) -> Batch:
    tokens = ids(sum(seqlens), vocabulary=vocabulary)
    targets = tokens.roll(-1, 1)
    targets[:, ::5] = UNTRAINED
    return Batch(tokens, targets, list(seqlens), int((targets != UNTRAINED).sum()))


Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


def step(model: GPT, *batches: Batch) -> Step:
    """The loss and the gradients of a step, on the CPU."""
    total = torch.zeros(())
    for batch in batches:
        loss = LossModel(model)(batch.to(model.device)) / batch.n_target_tokens
        loss.backward()
        total += loss.detach().cpu()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and bool(total.isfinite())
    return total, {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))


def assert_same_step(ours: Step, theirs: Step, close: float) -> None:
    """The loss, and all gradients together."""
    assert abs(float(ours[0] - theirs[0])) <= close * abs(float(theirs[0])), (ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    a, b = (torch.cat([grads[name].flatten() for name in theirs[1]]) for grads in (ours[1], theirs[1]))
    worst = {name: difference(ours[1][name], g) for name, g in theirs[1].items()}
    assert difference(a, b) <= close, (difference(a, b), sorted(worst.items(), key=lambda item: -item[1])[:5])


# one model, like that of `transformers`


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_transformers(family, dtype, device, folder):
    """In bfloat16, a token of which a rounding changes the experts is another token: a few may be off."""
    theirs = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32, attn_implementation="eager")
    theirs.train()
    model, close, text = make(folder(family), device, dtype), CLOSE[dtype], ids(70)
    logits, expected = model(text.to(device)).cpu().float()[0], theirs(text).logits[0]
    each = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)  # (T,)
    allowed = 0.1 if dtype == torch.bfloat16 and family in ("mixtral", "gpt_oss") else 0.0
    assert float((each > close).float().mean()) <= allowed, each.topk(5).values
    nn.functional.cross_entropy(expected[:-1], text[0, 1:]).backward()
    step(model, Batch(text[:, :-1], text[:, 1:], [69], 69))
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    pairs = []
    for parameter in weight_map(model.config).parameters(model).values():
        for tensor in parameter.tensors:
            grad = find(gradients, aliases(model.config.model_type).in_memory(tensor.name))[1]
            if grad is not None:
                ours = tensor.form.from_ours(parameter.value.grad[tensor.rows].float().cpu())
                pairs.append((ours.flatten(), grad.flatten()))
    assert len(pairs) > 20
    a, b = (torch.cat(parts) for parts in zip(*pairs))
    assert difference(a, b) <= (0.3 if allowed else close), difference(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_single_rows(family, dtype, device, folder):
    seqlens, batch = (33, 1, 50, 8), make_batch()
    singles = [
        Batch(i, t, [i.size(1)], int((t != UNTRAINED).sum()))
        for i, t in zip(batch.ids.split(seqlens, 1), batch.targets.split(seqlens, 1))
    ]
    packed = step(make(folder(family), device, dtype), batch)
    model, total = make(folder(family), device, dtype), 0.0
    for single in singles:
        if single.n_target_tokens:
            loss = LossModel(model)(single.to(device)) / batch.n_target_tokens
            loss.backward()
            total += loss.detach().cpu()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    moe = dtype == torch.bfloat16 and family == "mixtral"
    assert_same_step(packed, (torch.as_tensor(total), gradients), 0.3 if moe else CLOSE[dtype])


# a step of every method


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_cpus(family, method, dtype, device, folder):
    """The CPU's in float32, that is."""
    apply, scheme, close = METHODS[method]
    if scheme and bitsandbytes is None:
        pytest.skip("bitsandbytes is missing")
    batch = make_batch()
    model = make(folder(family), device, dtype, apply, scheme)
    with reference():
        expected = make(folder(family), CPU, method=apply, scheme=scheme)
        theirs = step(expected, batch)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            other: Any = expected.get_submodule(name)
            assert difference(layer.dequantized().cpu(), other.dequantized()) < 1e-2, name
    if dtype == torch.bfloat16:
        close = max(close, 0.5 if family == "mixtral" else 0.1)  # what is unrelated differs by 1.4
    assert_same_step(step(model, batch), theirs, close)


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.long) for m in RESUMED])
def test_resumed(method, device, base, rows_file, tmp_path):
    """Six steps are three and three more. Kernels of a GPU may add in any order."""
    if method == "nf4" and bitsandbytes is None:
        pytest.skip("bitsandbytes is missing")
    flags = ["--train.max_steps", 6, "--train.save_interval", 3, "--accelerator", device.type]
    assert go(method, base, rows_file, tmp_path / "whole", *flags) == 0
    assert go(method, base, rows_file, tmp_path / "out", *flags, "--train.pause_after", 3) == 75
    assert go(method, base, rows_file, tmp_path / "out", *flags, "--resume", "true") == 0
    close = 2e-2 if "bf16" in method else 1e-3
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "out")
    assert [line["step"] for line in parts] == [line["step"] for line in whole] and parts[-1]["step"] == "6"
    for name in ("loss", "val_loss"):
        ours, theirs = ([float(line[name]) for line in run if line[name]] for run in (parts, whole))
        assert ours == pytest.approx(theirs, rel=close)
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(difference(ours[name], theirs[name]) < 10 * close for name in theirs)


# what saves memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offload", [False, True], ids=["block", "offload"])
@pytest.mark.parametrize("method", ["full", "lora", "nf4"])
def test_activation_checkpointing(method, offload, dtype, device, folder):
    lora, scheme = (None, None) if method == "full" else (LoRA(**{**EVERYWHERE, "dropout": 0.3}), METHODS[method][1])
    if scheme and bitsandbytes is None:
        pytest.skip("bitsandbytes is missing")
    steps = []
    for checkpointing in (False, True):
        model = make(folder("llama"), device, dtype, lora, scheme)
        if checkpointing:
            recompute(model, offload)
        torch.manual_seed(3)  # of dropout
        steps.append(step(model, make_batch()))
    assert_same_step(steps[1], steps[0], 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rematerialization(family, dtype, device, folder):
    """What is computed again is what would have been kept."""
    lora, steps = LoRA(**{**EVERYWHERE, "dropout": 0.3}), []
    for kept in (False, True):
        model = make(folder(family), device, dtype, lora)
        if kept:
            model.saved_tensors = lambda x: nullcontext()  # type: ignore[method-assign]
        torch.manual_seed(3)
        steps.append(step(model, make_batch()))
    assert_same_step(steps[0], steps[1], 1e-5 if dtype == torch.float32 else 1e-2)


def test_experts_as_one_matmul(device, folder):
    steps = []
    for grouped in (True, False):
        model = make(folder("mixtral"), device, torch.bfloat16)
        experts = [block.mlp for block in model.transformer.h if isinstance(block.mlp, LLaMAMoE)]
        assert len(experts) == 3 and all(each.stacks is not None for each in experts)
        for each in experts if not grouped else ():
            each.stacks = None
        steps.append(step(model, make_batch()))
    assert_same_step(steps[0], steps[1], CLOSE[torch.bfloat16])


# the optimizer


def test_bfloat16_is_rounded_stochastically(device):
    rounding = StochasticRounding(torch.Generator(device).manual_seed(0))
    values = torch.tensor([1.001, -1.001, 3.0, -0.3], device=device)
    drawn = round_stochastically_(values.repeat(20_000, 1), rounding).double()
    assert torch.equal(drawn, drawn.bfloat16().double())
    for value, found in zip(values.double().tolist(), drawn.t()):
        low, high = float(found.min()), float(found.max())
        assert low <= value <= high and float(found.mean()) == pytest.approx(value, abs=(high - low) / 50 + 1e-40)


def test_adamw_in_bfloat16(device):
    """Small updates are not lost, and twenty steps follow float32."""
    p = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16, device=device))
    optimizer = AdamW([p], lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.detach().double().mean()) == pytest.approx(0.99, abs=5e-4)
    start = torch.randn(3, 41, 67, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded, exact = nn.Parameter(start.clone().to(device)), nn.Parameter(start.float())
    optimizers = AdamW([rounded], lr=0.01), torch.optim.AdamW([exact], lr=0.01)
    for seed in range(20):
        grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        rounded.grad, exact.grad = grad.to(device), grad.float()
        for each in optimizers:
            each.step()
    moved = exact.detach() - start.float()
    assert difference(rounded.detach().cpu().float() - start.float(), moved) < 0.25  # one rounding per step
    assert float((rounded.detach().cpu() - exact.detach()).mean()) == pytest.approx(0, abs=5e-4)


# decoding


def decoder(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, scheme: str | None = None) -> GPT:
    return ModelSource.open(folder).model(dtype, device, scheme)


def prompts(n: int = 12) -> list[list[int]]:
    return [ids(1 + 13 * i % 60, i)[0].tolist() for i in range(n)]


def alone(model: GPT, texts: list[list[int]], n_new: int = 20) -> list[list[int]]:
    return [list(generate(model, prompt, n_new)) for prompt in texts]


def decoded(model: GPT, draft: GPT, texts: list[list[int]], expected: list[list[int]]) -> dict[str, list[list[int]]]:
    """Greedy text, by the way in which it is decoded. After a known prefix, the text begins with what was expected."""
    found = {"alone": alone(model, texts)}
    for mode, chunk in (("batch", 512), ("chunks", 7)):
        requests = [Request(prompt, 20) for prompt in texts]
        with mock.patch.object(engine_module, "CHUNK", chunk):
            assert len(list(Engine(model, 5).run(requests))) == len(texts)
        found[mode] = [request.ids for request in requests]
    found["prefix"] = []
    for prompt, answer in zip(texts, expected):
        engine, request = Engine(model, 1), Request([*prompt, *answer[:10]], 10)
        assert len(list(engine.run([Request(prompt, 20), request]))) == 2
        found["prefix"].append([*answer[:10], *request.ids])
    requests = [Request(prompt, 20) for prompt in texts]
    for _ in Speculation(model, draft, 3).grow(requests):
        pass
    return found | {"speculative": [request.ids for request in requests]}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_cpus(family, device, folder):
    """One by one, in a batch, with prompts in chunks, after a known prefix, and with drafts."""
    with reference():
        expected = alone(decoder(folder(family), CPU), prompts())
    draft = decoder(folder("llama"), device)
    for mode, found in decoded(decoder(folder(family), device), draft, prompts(), expected).items():
        assert found == expected, mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cache(family, dtype, device, folder):
    """Two texts in one cache, read in pieces whose lengths fall before, across, and after a window."""
    model = decoder(folder(family), device, dtype)
    lengths = ([7, 1, 1, 9, 1, 20, 1, 1], [3, 1, 1, 1, 18, 1, 1, 1])
    texts = [ids(sum(n)) for n in lengths]
    cache, rows, parts = KVCache(model.config), [2, 0], []
    for pair in zip(*(text.split(n, dim=1) for text, n in zip(texts, lengths))):
        seqlens = [piece.size(1) for piece in pair]
        read = model(torch.cat(pair, dim=1).to(device), seqlens, cache, rows)
        parts.append(read.split(seqlens, dim=1))
    allowed = 0.2 if dtype == torch.bfloat16 and family in ("mixtral", "gpt_oss") else 0.0
    for text, pieces in zip(texts, zip(*parts)):
        found, expected = torch.cat(pieces, dim=1)[0].float(), model(text.to(device))[0].float()
        each = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float((each > CLOSE[dtype]).float().mean()) <= allowed, each.topk(3).values


@pytest.mark.parametrize("scheme", [None, "bnb.nf4", "bnb.int8"])
@torch.no_grad()
def test_text_in_bfloat16(scheme, device, folder):
    """Each token of a batch has nearly the highest probability that a single pass over the text gives."""
    if scheme and bitsandbytes is None:
        pytest.skip("bitsandbytes is missing")
    model = decoder(folder("llama"), device, torch.bfloat16, scheme)
    texts = [Request(prompt, 20, logprobs=2) for prompt in prompts()]
    assert len(list(Engine(model, 5).run(texts))) == len(texts)
    for text in texts:
        whole = torch.tensor([[*text.prompt, *text.ids]], device=device)
        logprobs = model(whole)[0, len(text.prompt) - 1 : -1].float().log_softmax(-1).cpu()
        chosen = logprobs.gather(1, torch.tensor(text.ids)[:, None])[:, 0]
        slack = 0.5 if scheme == "bnb.int8" else 0.2
        assert float((logprobs.amax(1) - chosen).max()) < slack
        assert float((torch.tensor(text.token_logprobs) - chosen).abs().max()) < slack


@pytest.mark.parametrize("scheme", [None, "bnb.nf4"])
def test_two_adapters_at_once(scheme, device, folder, tmp_path):
    """Texts with different adapters share a batch, and each is that of its adapter alone."""
    if scheme and bitsandbytes is None:
        pytest.skip("bitsandbytes is missing")
    base = folder("llama")
    kinds = {"a": LoRA(**EVERYWHERE), "b": LoRA(r=2, variant="dora", key=True)}
    for seed, (name, lora) in enumerate(kinds.items()):
        model = make(base, CPU, method=lora)
        torch.manual_seed(seed)
        for leaf, p in model.named_parameters():
            if leaf.endswith("lora_B"):
                nn.init.normal_(p, std=0.2)
        (tmp_path / name).mkdir()
        write_lora(lora, model, str(base), tmp_path / name)
    expected = {name: alone(decoder(tmp_path / name, device, scheme=scheme), prompts(), 12) for name in kinds}
    together = decoder(base, device, scheme=scheme)
    plain = alone(decoder(base, device, scheme=scheme), prompts(), 12)
    assert expected["a"] != expected["b"] != plain
    adapters = add_adapters(together, {name: open_adapter(tmp_path / name) for name in kinds})
    names = ["a", None, "b"]
    texts = [Request(prompt, 12, adapter=names[i % 3]) for i, prompt in enumerate(prompts())]
    assert len(list(Engine(together, 5, adapters=adapters).run(texts))) == len(texts)
    for i, text in enumerate(texts):
        assert text.ids == (plain if text.adapter is None else expected[text.adapter])[i], (i, text.adapter)
