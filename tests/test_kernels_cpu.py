"""With the kernels for CPUs turned off, a CPU runs the code of a GPU. The model is the same there."""

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from litgpt.data.batches import Batch
from litgpt.model import attention_kernels, delta_rule, kernels, kernels_cpu, state_space
from litgpt.model.chunked_attention import Scores
from litgpt.model.packing import Packing
from litgpt.train.loss import LossModel
from tests import test_families, test_gradients, test_training
from tests.families import ALL, FAMILIES, save_random
from tests.test_families import test_cache, test_documents, test_logits  # noqa: F401
from tests.test_training import files  # noqa: F401

pytestmark = pytest.mark.usefixtures("plain_kernels")
SAMPLE = ("llama", "gemma2", "mistral", "mixtral", "gpt_oss")  # among them soft caps, windows, experts and sinks
FIRST = [(family, next(iter(FAMILIES[family]))) for family in SAMPLE]
CASES = [pytest.param(case, marks=() if case in FIRST else pytest.mark.long, id=" ".join(case)) for case in ALL]
LLAMA_OR_LONG = [pytest.param(f, marks=() if f == "llama" else pytest.mark.long) for f in FAMILIES]
X, SCORES = torch.ones(1, 2, 3, 4), Scores(1.0)
ARGUMENTS: dict[str, tuple] = {
    "linear": (X, torch.ones(5, 4)),
    "prepacked": (X,),
    "prepacked_4bit": (X, None),
    "rms_norm": (X, torch.ones(4), 1e-5),
    "dropout": (X, 0.5),
    "remat": (X, torch.exp),
    "saved_tensors": (X,),
    "stacked": (X[0, 0], X[0, 0]),
    "causal_attention": (X, X, X, SCORES),
    "packed_attention": (X, X, X, SCORES, Packing.of([3])),
    "delta_rule": (X, X, X, X[..., 0], X[..., 0]),
    "state_space": (X, X, X, X[..., 0]),
    "masked_attention": (X, X, X, SCORES, None),
    "empty_cache": (X, 1, 4),
    "padded_length": (X, 3),
    "logits_at_once": (X,),
    "cross_entropy_": (torch.ones(2, 3), torch.tensor([0, 2])),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in `test_families`, whose tests run here too."""
    return save_random(tmp_path_factory.mktemp("m") / "model", *request.param)


def test_gradients_of_all_weights(folder):
    test_families.test_gradients(folder)


@pytest.mark.long
def test_greedy_text(folder):
    test_families.test_greedy_text(folder)
    test_families.test_greedy_text_of_many(folder)


def test_loss_curve_is_that_of_the_kernels(folder, monkeypatch):
    monkeypatch.setattr(kernels_cpu, "LARGE", 1)
    monkeypatch.setattr(kernels_cpu, "NORM_SIZE", 0)
    curves = []
    for enabled in (False, True):
        monkeypatch.setattr(kernels, "enabled", enabled)
        model = LossModel(test_families.ours(folder).requires_grad_(True).train())
        optimizer, curve = torch.optim.SGD(model.parameters(), lr=0.03), []
        for n in (40, 64, 7, 40):
            ids = test_families.ids(n)
            loss = model(Batch(ids, ids.roll(-1, 1), [n - 5, 5], n)) / n
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][3] < curves[0][0]


@pytest.mark.parametrize("family", LLAMA_OR_LONG)
@pytest.mark.parametrize("scheme", [None, pytest.param("bnb.nf4", marks=pytest.mark.long)])
def test_every_trained_weight_has_a_gradient(family, scheme, tmp_path):
    test_gradients.test_every_trained_weight_has_a_gradient(family, scheme, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("everything", [False, True])
def test_loss_curve_of_peft(llama, files, tmp_path, everything):  # noqa: F811
    test_training.test_loss_curve_of_peft(llama, files, tmp_path, everything)


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), (None, True)])
def test_the_environment_variable(monkeypatch, value, enabled):
    monkeypatch.delenv("LITGPT_CPU_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("LITGPT_CPU_KERNELS", value)
    assert runpy.run_path(str(kernels.__file__))["enabled"] is enabled


@pytest.mark.parametrize("name", kernels.FASTER)
def test_the_switch_turns_off_every_kernel(name, monkeypatch):
    def reached(*args: object) -> None:
        raise AssertionError("the kernel for CPUs was called")

    assert kernels.FASTER[name]["cpu"] is getattr(kernels_cpu, name)
    monkeypatch.setitem(kernels.FASTER[name], "cpu", reached)
    module = next(m for m in (kernels, attention_kernels, delta_rule, state_space) if hasattr(m, name))
    call = partial(getattr(module, name), *ARGUMENTS[name])
    call()
    monkeypatch.setattr(kernels, "enabled", True)
    with pytest.raises(AssertionError, match="for CPUs"):
        call()
