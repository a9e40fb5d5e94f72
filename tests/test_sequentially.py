"""Layers on several devices give what they give on one."""

from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.generate.engine import Engine, Request
from litgpt.generate.several_devices import DeviceContexts, spread, usable_devices
from litgpt.methods.model_source import ModelSource
from litgpt.model.attention import ForwardContext
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import EachRow
from litgpt.model.packing import Packing
from tests.families import save_random

CPU = torch.device("cpu")
PROMPTS = [[5], [7, 9, 11, 200], list(range(20, 90))]


def load(folder: Path) -> GPT:
    return ModelSource.open(folder).model(torch.float32, CPU)


def decoded(model: GPT) -> list[list[int]]:
    texts = [Request(prompt, 20) for prompt in PROMPTS]
    list(Engine(model, 2).run(texts))
    return [text.ids for text in texts]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_same_text(base, n, monkeypatch):
    expected, model, used = decoded(load(base)), load(base), set()
    on = DeviceContexts.on
    monkeypatch.setattr(
        DeviceContexts, "on", lambda self, context, device: used.add(device) or on(self, context, device)
    )
    spread(model, [CPU] * n)
    assert decoded(model) == expected and used == {CPU}


def test_keys_of_a_layer_on_another_device(tmp_path):
    """Layers that use the keys and values of an earlier one."""
    folder = save_random(tmp_path / "m", "gemma4_text", "per layer", changes={"vocab_size": 201})
    expected, model = decoded(load(folder)), load(folder)
    spread(model, [CPU, torch.device("cpu", 0)])  # which are two to `DeviceContexts`
    assert decoded(model) == expected


def test_blocks_are_on_their_devices(base):
    meta = torch.device("meta")
    model = load(base)
    spread(model, [CPU, meta])
    where = [block.mlp.proj.weight.device for block in model.transformer.h]
    assert where == [CPU, CPU, meta] and model.device == CPU and model.lm_head.weight.device == CPU


def test_all_that_layers_share_is_moved():
    def t() -> torch.Tensor:
        return torch.ones(2)

    each = EachRow(t(), t(), t(), 1, 3, 3, {3: t()})
    context = ForwardContext(Packing([2], t(), t()), [(t(), t()), (t(), t())], None, (0,), each, {0: t()})
    copies, meta = DeviceContexts(), torch.device("meta")
    there = copies.on(context, meta)
    tensors: list[torch.Tensor] = []

    def find(value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            [find(v) for v in value]
        elif isinstance(value, dict):
            find(list(value.values()))
        elif is_dataclass(value):
            find(vars(value))

    find(there)
    assert len(tensors) == 11 and all(x.device == meta for x in tensors)
    assert copies.on(context, meta) is there, "moved once for all layers of a device"
    assert copies.on(replace(context), meta) is not there


def test_the_command(llama, capsys):
    words = [str(llama), "--prompt", "the quick", "--temperature", "0", "--accelerator", "cpu"]
    main(["generate", *words])
    expected = capsys.readouterr().out
    main(["generate_sequentially", *words])
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit) as stop:
        main(["generate_sequentially", *words, "--devices", "3"])
    assert stop.value.code == 2 and "--devices 3" in capsys.readouterr().err
    with pytest.raises(UserError):
        usable_devices("cpu", 0)


@pytest.mark.gpu
def test_a_gpu_and_a_cpu(base):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    expected, model = decoded(load(base)), load(base)
    spread(model, [torch.device("cuda", 0), CPU])
    assert decoded(model) == expected
