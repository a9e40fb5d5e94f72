"""What a GPU runs and the kernels for CPUs agree, for every method, quantization, and family with fused layers, and for
every way to decode.

On a CPU, with 8 bits multiplied by bitsandbytes' function for CUDA.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2
from litgpt.methods.lora import LoRA
from litgpt.model import kernels, kernels_cpu
from litgpt.model.linear import prepack
from tests import test_gpu
from tests.families import FAMILIES, save_random
from tests.test_gpu import CPU, EVERYWHERE, alone, assert_same_step, cpu_as_gpu, decoded, decoder, make  # noqa: F401

pytestmark = pytest.mark.usefixtures("cpu_as_gpu", "no_threshold")
METHODS: dict[str, Callable[[str], Any]] = {  # by family
    "full": lambda family: None,
    "lora": lambda family: LoRA(dropout=0.0),
    "lora everywhere": lambda family: LoRA(**EVERYWHERE),
    "dora": lambda family: LoRA(**EVERYWHERE | {"mlp": family != "mixtral"}, variant="dora"),  # not for experts
    "adapter": lambda family: LLaMAAdapter(4, 1),
    "adapter_v2": lambda family: LLaMAAdapterV2(4, 1),
}
SCHEMES = (None, "bnb.nf4", "bnb.int8")
# How close gradients are. With 8 bits, another rounding of a float may round an activation to the next integer.
CLOSE = {None: 1e-5, "bnb.nf4": 1e-5, "bnb.int8": 3e-2}
FUSED = ("phi3", "falcon", "gpt_neox", "llama", "mixtral")
DECODED = ("mistral", "phi3", "mixtral")  # windows, a rope that switches, and experts


def steps() -> Iterator[Any]:
    """All layers in 8 bits, whose results are views on CUDA, and the methods of one family are quick."""
    for family in FUSED:
        for method in METHODS:
            for scheme in SCHEMES if method != "full" else (None,):
                quick = scheme == "bnb.int8" if method == "lora everywhere" else family == "llama" and not scheme
                marks = () if quick else pytest.mark.long
                yield pytest.param(family, method, scheme, marks=marks, id=f"{family} {method} {scheme}")


@pytest.fixture
def no_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for CPUs are used for models as small as these."""
    monkeypatch.setattr(kernels_cpu, "LARGE", 1)
    monkeypatch.setattr(kernels_cpu, "NORM_SIZE", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of a family. Read only."""
    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            made[family] = save_random(tmp_path_factory.mktemp("m") / family, family, next(iter(FAMILIES[family])))
        return made[family]

    return save


@pytest.mark.parametrize(("family", "method", "scheme"), steps())
def test_a_step(family, method, scheme, folder, monkeypatch):
    if scheme:
        pytest.importorskip("bitsandbytes")
    if scheme == "bnb.int8":  # a large input anywhere in a batch changes how all of it is rounded, padding too
        monkeypatch.delitem(kernels.FASTER["padded_length"], "cpu")
    apply, batch = METHODS[method](family), test_gpu.make_batch(vocabulary=199)
    plain = test_gpu.step(make(folder(family), CPU, method=apply, scheme=scheme), batch)
    with test_gpu.reference(own_matmul=False):
        theirs = test_gpu.step(make(folder(family), CPU, method=apply, scheme=scheme), batch)
    assert_same_step(plain, theirs, CLOSE[scheme])
    assert len(plain[1]) >= (2 if method == "adapter" else 6)


@pytest.mark.parametrize("scheme", [None, "bnb.nf4"])
@pytest.mark.parametrize("family", [f if f in DECODED else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES])
def test_decoding(family, scheme, folder):
    """Greedy text is what the kernels for CPUs give, with weights in their layout."""
    if scheme:
        pytest.importorskip("bitsandbytes")
    texts = [[token % 190 + 2 for token in prompt] for prompt in test_gpu.prompts(6)]
    with test_gpu.reference():
        model = decoder(folder(family), CPU, scheme=scheme)
        prepack(model)
        expected = alone(model, texts)
    draft = decoder(folder(family), CPU)
    with torch.no_grad():
        torch.manual_seed(0)
        for p in draft.parameters():
            p += 0.02 * torch.randn_like(p)  # a draft that is often right
    for mode, found in decoded(decoder(folder(family), CPU, scheme=scheme), draft, texts, expected).items():
        assert found == expected, mode
