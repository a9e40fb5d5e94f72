"""What a GPU would meet: tensors on two devices, transfers that the host waits for, and copies from pageable memory.

On the meta device, under `tests.device_mode`.
"""

from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.data.batches import UNTRAINED, Batch
from litgpt.data.preferences import make_batch as make_batch_of
from litgpt.data.tokens import ANSWER, IN_LOSS, REJECTED
from litgpt.families import read_config
from litgpt.generate.adapters import AdaptedLinear, Adapters
from litgpt.generate.engine import Engine, Request
from litgpt.generate.sampling import Sampling
from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2
from litgpt.methods.lora import LoRA, lora_layers
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model.gpt import GPT
from litgpt.train import run
from litgpt.train.loop import Trainer
from litgpt.train.loss import LossModel
from litgpt.train.memory.stand_ins import gpu_kernels
from litgpt.train.objectives import OBJECTIVES, PreferenceArgs
from litgpt.train.optimizers import parameter_groups
from tests.device_mode import DeviceMode, MixedDevices, device_mode
from tests.families import FAMILIES
from tests.runs import words
from tests.test_training import files  # noqa: F401

META = torch.device("meta")
EVERYWHERE = {name: True for name in ("query", "key", "value", "projection", "mlp", "head")}
METHODS = {
    "full": None,
    "lora": LoRA(),
    "lora everywhere": LoRA(**EVERYWHERE),  # type: ignore[arg-type]
    "dora": LoRA(variant="dora", projection=True),
    "adapter": LLaMAAdapter(start_layer=0),
    "adapter_v2": LLaMAAdapterV2(start_layer=0),
}
SAMPLE = ("llama", "gemma2", "mistral", "mixtral", "phi3", "qwen3_moe", "gpt_oss")
ALL = [(family, name) for family, variants in FAMILIES.items() for name in variants]
FIRST = [(family, next(iter(FAMILIES[family]))) for family in SAMPLE]
CASES = [pytest.param(*case, marks=() if case in FIRST else pytest.mark.long, id=" ".join(case)) for case in ALL]
EXPERTS = {"intermediate_size": 64, "moe_intermediate_size": 32}  # sizes that grouped matmuls take


class Done(Exception):
    pass


def make_model(family: str, name: str = "", method: Any = None, scheme: str | None = None) -> GPT:
    fields = FAMILIES[family][name or next(iter(FAMILIES[family]))]
    config = read_config({"model_type": family} | fields | {k: v for k, v in EXPERTS.items() if k in fields})
    with META:
        model = GPT(config)
        if scheme is not None:
            quantize(model, scheme, torch.device("cpu"))
        if method is not None:
            method.apply(model)
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                for part, rows in enumerate(layer.parts):
                    layer.store(part, torch.empty(rows, layer.in_features, dtype=torch.bfloat16))
    model = model.to(torch.bfloat16)
    model.stack_experts()
    return model


def make_batch() -> Batch:
    ids = torch.arange(40)[None] + 3
    targets = ids.roll(-1, 1)
    targets[:, ::5] = UNTRAINED
    return Batch(ids, targets, [17, 1, 22], int((targets != UNTRAINED).sum()))


def train(model: GPT, mode: DeviceMode) -> None:
    """Two micro-batches; what is made once counts in the first alone."""
    loss_model = LossModel(model.train())
    for _ in range(2):
        mode.clear()
        loss_model(make_batch().to(META)).backward()


def decode(engine: Engine, mode: DeviceMode, steps: int = 4) -> list[int]:
    """The number of reads in each step."""
    reads = []
    for _ in range(steps):
        mode.clear()
        engine.step()
        assert not mode.copies and not mode.indices, (mode.copies, mode.indices)
        reads.append(len(mode.reads))
    return reads


def submit(engine: Engine, prompts: list[list[int]], **kwargs: Any) -> None:
    for prompt in prompts:
        engine.submit(Request(prompt, 8, **kwargs))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_training(family, name, method):
    """No operator meets two devices, and nothing in a block is read or copied."""
    model = make_model(family, name, METHODS[method])
    reads_counts = bool(model.config.n_expert) and method in ("lora everywhere", "adapter_v2")
    with gpu_kernels(), device_mode() as mode:
        train(model, mode)
        assert not mode.copies and not mode.indices, (mode.copies, mode.indices)
        # adapted experts run one by one, which takes their numbers of tokens
        assert not mode.reads or (reads_counts and all("run_experts" in line for line in mode.reads)), mode.reads
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("method", [None, LoRA()], ids=["full", "lora"])
def test_preferences(name, method):
    """The same for pairs and labeled answers."""
    objective = OBJECTIVES[name](name, PreferenceArgs(sft_weight=None if name == "kto" else 0.5))
    loss_model = objective.loss_model(make_model("llama", method=method).train())
    sequences = [
        (torch.arange(n, dtype=torch.int32) + 3, torch.tensor([0, 0, *[IN_LOSS | ANSWER] * (n - 2)]) | bad * REJECTED)
        for n, bad in ((9, 0), (17, 1), (5, 0), (4, 1))
    ]
    batch = make_batch_of(sequences, torch.zeros(4), is_empty=False)
    with gpu_kernels(), device_mode() as mode:
        for _ in range(2):
            mode.clear()
            loss_model(batch.to(META)).sum().backward()
            objective.take_sums(META)
    assert not mode.copies and not mode.indices and not mode.reads, (mode.copies, mode.indices, mode.reads)


@pytest.mark.parametrize("family", SAMPLE)
def test_training_4_bits(family):
    pytest.importorskip("bitsandbytes")
    model = make_model(family, "", LoRA(**EVERYWHERE), "bnb.nf4")  # type: ignore[arg-type]
    with gpu_kernels(), device_mode() as mode:
        train(model, mode)
    assert not mode.copies and not mode.indices and all("run_experts" in line for line in mode.reads)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_decoding(family, name):
    """A step of prompts and a step of tokens read once each, however the tokens are drawn."""
    engine = Engine(make_model(family, name).eval(), rows=4)
    with gpu_kernels(), device_mode() as mode:
        submit(engine, [[3, 4, 5], [6, 7, 8, 9], [3]])
        assert decode(engine, mode)[1:] == [1, 1, 1]
        submit(engine, [[3, 4, 5, 9, 8, 7, 3]], sampling=Sampling(repetition_penalty=1.2), logprobs=3)
        assert all(n <= 2 for n in decode(engine, mode))


@pytest.mark.parametrize("scheme", [None, "bnb.nf4"])
def test_decoding_with_several_adapters(scheme):
    if scheme:
        pytest.importorskip("bitsandbytes")
    model, adapters = make_model("llama", scheme=scheme).eval(), Adapters()
    updates = {name: lora_layers(make_model("llama", method=LoRA())) for name in ("a", "b")}
    for path in updates["a"]:
        layer = AdaptedLinear(model.get_submodule(path), adapters)
        layer.updates = {name: layers[path].eval() for name, layers in updates.items()}
        for update in layer.updates.values():
            update.linear = layer.linear  # type: ignore[assignment]
        model.set_submodule(path, layer)
    engine = Engine(model, rows=6, adapters=adapters)
    with gpu_kernels(), device_mode() as mode:
        for adapter in ("a", None, "b", "a"):
            submit(engine, [[3, 4, 5, 6]], adapter=adapter)
        assert decode(engine, mode)[1:] == [1, 1, 1]


def test_a_step_reads_once(llama, files, tmp_path, monkeypatch):  # noqa: F811
    """The real loop, on the meta device."""
    seen: dict[str, list[str]] = {}

    class OnMeta(Trainer):
        def __init__(self, run: Any) -> None:
            run.fabric.device = META
            run.fabric_model.to(META)
            run.fabric_optimizer = torch.optim.SGD(parameter_groups(run.model))
            super().__init__(run)

        def log_step(self, *args: Any) -> None:
            seen.setdefault("reads", []).extend(mode.reads)
            seen.setdefault("copies", []).extend(mode.copies)
            mode.clear()

        def fit(self) -> None:
            self.prepare()
            mode.clear()
            super().fit()
            raise Done

    monkeypatch.setattr(run, "Trainer", OnMeta)
    flags = [
        "--eval.initial_validation",
        "false",
        "--eval.final_validation",
        "false",
        "--eval.interval",
        "100",
        "--train.save_interval",
        "100",
        "--data.val_split_fraction",
        "null",
    ]
    with gpu_kernels(), device_mode() as mode, pytest.raises(Done):
        main(words("lora", llama, files, tmp_path / "out", *flags))
    assert len(seen["reads"]) == 12 and not seen["copies"], seen


# each of these faults makes a test above fail


def test_a_read_in_a_block_is_found(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(model.transformer.h[1].mlp, "glu", lambda x: x.chunk(2, -1)[0] * x.max().item())
    with gpu_kernels(), device_mode() as mode:
        train(model, mode)
    assert mode.reads


def test_a_cpu_weight_in_a_linear_layer_is_found():
    model = make_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.ones(model.lm_head.weight.shape, dtype=torch.bfloat16))
    with gpu_kernels(), device_mode() as mode, pytest.raises(MixedDevices):
        train(model, mode)


def test_a_cpu_index_in_decoding_is_found(monkeypatch):
    engine = Engine(make_model("llama").eval(), rows=2)
    head = engine.model.lm_head.forward
    monkeypatch.setattr(engine.model.lm_head, "forward", lambda x: head(x[torch.arange(len(x), device="cpu")]))
    with gpu_kernels(), device_mode() as mode, pytest.raises(AssertionError):
        submit(engine, [[3, 4], [5, 6]])
        decode(engine, mode)


def test_a_pageable_copy_of_a_batch_is_found():
    model, batch = make_model("llama"), make_batch()
    with gpu_kernels(), device_mode() as mode:
        batch.ids.to(META)
        LossModel(model)(batch.to(META))
    assert len(mode.copies) == 1
