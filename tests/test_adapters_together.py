"""Texts with different adapters are decoded in one batch as each would be alone."""

from pathlib import Path

import pytest
import torch

from litgpt.errors import UserError
from litgpt.generate.adapters import Adapters, add_adapters
from litgpt.generate.engine import Engine, Request, generate
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.lora import LoRA
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_export import write_lora
from tests.conftest import save_llama, some
from tests.families import FAMILIES, save_random
from tests.test_lora import CPU, save, with_lora

KINDS = {
    "qv": LoRA(r=4, alpha=16),
    "all": LoRA(r=2, alpha=8, key=True, projection=True, mlp=True, head=True),
    "dora": LoRA(r=3, alpha=6, mlp=True, variant="dora"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    return save_llama(tmp_path_factory.mktemp("m") / "base", tokenizer_file, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save(with_lora(base, lora, seed), lora, base, root / name)
        for seed, (name, lora) in enumerate(KINDS.items())
    }


def texts(n: int = 24) -> list[Request]:
    """Prompts that begin alike, so that what another adapter left in the cache is tempting."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randint(2, 300, (20,), generator=draw).tolist()
    names = [None, *KINDS]
    made = []
    for i in range(n):
        more = torch.randint(2, 300, (i % 3 * 7,), generator=draw).tolist()
        made.append(Request(start + more, 6 + i % 5, adapter=names[i * 7 % 4]))
    return made


FAMILY = {  # models whose adapters cannot share a forward pass
    "longrope": ("phi3", "longrope", LoRA(r=3, alpha=12, key=True, mlp=True)),
    "experts": ("mixtral", "plain", LoRA(r=3, alpha=12, mlp=True)),
    "experts in stacks": ("gpt_oss", "plain", LoRA(r=3, alpha=12, mlp=True)),
    "latents": ("deepseek_v3", "yarn", LoRA(r=3, alpha=12, key=True, mlp=True, projection=True)),
    "more experts": ("qwen3_moe", "plain", LoRA(r=3, alpha=12, mlp=True, projection=True)),
}


@pytest.mark.parametrize("kind", some(FAMILY, *(kind for kind in FAMILY if kind != "latents")))
@torch.no_grad()
def test_one_adapter_after_the_other(kind, tmp_path):
    family, variant, lora = FAMILY[kind]
    variant = variant if variant in FAMILIES[family] else next(iter(FAMILIES[family]))
    base = save_random(tmp_path / "base", family, variant)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_lora(lora, with_lora(base, lora), str(base), folder)
    alone = {name: ModelSource.open(path).model(torch.float32, CPU) for name, path in ((None, base), ("a", folder))}
    together = ModelSource.open(base).model(torch.float32, CPU)
    adapters = add_adapters(together, {"a": open_adapter(folder)})
    assert adapters.uniform
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 190, (n,), generator=draw).tolist() for n in (30, 38, 5, 39, 30, 12)]
    done = [Request(ids, 12, adapter=name) for ids in prompts for name in (None, "a")]
    assert len(list(Engine(together, 4, adapters=adapters).run(done))) == len(done)
    expected = [list(generate(alone[r.adapter], r.prompt, 12)) for r in done]
    assert [r.ids for r in done] == expected
    assert expected[::2] != expected[1::2], "the adapter makes a difference"


@pytest.mark.parametrize("rows", [1, 3, 9])
@torch.no_grad()
def test_each_text_has_its_own_adapter(base, folders, rows):
    alone = {name: ModelSource.open(folder).model(torch.float32, CPU) for name, folder in folders.items()}
    alone[None] = ModelSource.open(base).model(torch.float32, CPU)  # type: ignore[index]
    together = ModelSource.open(base).model(torch.float32, CPU)
    adapters = add_adapters(together, {name: open_adapter(folder) for name, folder in folders.items()})
    done = texts()
    assert len(list(Engine(together, rows, adapters=adapters).run(done))) == len(done)
    expected = [list(generate(alone[t.adapter], t.prompt, t.max_new_tokens)) for t in done]  # type: ignore[index]
    assert [t.ids for t in done] == expected
    answers = {name: next(e for t, e in zip(done, expected) if t.adapter == name) for name in alone}
    assert len({tuple(ids[:6]) for ids in answers.values()}) == 4, "the adapters make a difference"


def test_places_of_tokens():
    adapters = Adapters()
    adapters.choose(["a", None, "b", "a", "b"], [2, 1, 1, 1, 1], torch.device("cpu"))
    (a, at_a), (b, at_b) = adapters.parts
    assert (a, b) == ("a", "b")
    assert torch.arange(6)[at_a].tolist() == [0, 1, 4] and torch.arange(6)[at_b].tolist() == [3, 5]
    adapters.choose([None, "b", "b"], [3, 2, 1], torch.device("cpu"))
    assert adapters.parts == [("b", slice(3, 6))]
    adapters.choose([None], [4], torch.device("cpu"))
    assert adapters.parts == []


def test_what_cannot_share_a_base(base, folders, tmp_path, tokenizer_file):
    model = ModelSource.open(base).model(torch.float32, CPU)
    whole = save(with_lora(base, LoRA(train_embeddings=True)), LoRA(train_embeddings=True), base, tmp_path / "whole")
    with pytest.raises(UserError, match=r"w: .*whole replaces complete weights") as error:
        add_adapters(model, {"w": open_adapter(whole), "qv": open_adapter(folders["qv"])})
    assert "qv" not in str(error.value)
    other = save_llama(tmp_path / "other", tokenizer_file, hidden_size=48)
    with pytest.raises(UserError, match="does not fit the model"):
        add_adapters(ModelSource.open(other).model(torch.float32, CPU), {"qv": open_adapter(folders["qv"])})
