"""Every family is the one of `transformers`: logits, text, gradients and what is written."""

import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from litgpt.checkpoint.folder import Checkpoint, load_weights, write_model
from litgpt.errors import UserError
from litgpt.families import aliases, read_config, weight_map
from litgpt.generate.engine import Engine, Request, generate
from litgpt.model import kernels_cpu
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache
from tests.families import ALL, FAMILIES, QUICK, save_random, warnings_of_transformers

CPU = torch.device("cpu")
GPT_OSS = aliases("gpt_oss")  # which has stacks of experts in files too
CASES = [pytest.param(case, marks=() if case in QUICK else pytest.mark.long, id=" ".join(case)) for case in ALL]


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("m") / "model", *request.param)


def theirs(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> GPT:
    with torch.device("meta"):
        model = GPT(Checkpoint(folder).config)
    load_weights(model, Checkpoint(folder), dtype, CPU)
    return model.eval()


def ids(n: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(2, 199, (rows, n), generator=torch.Generator().manual_seed(n))


def longest(config: Config) -> int:
    """Three times the window or the switch of a rope."""
    switch = config.rope_adjustments.get("original_max_position_embeddings", 0)
    return min(max(3 * (config.sliding_window_size or 0), 3 * switch, 60), config.block_size - 64)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float, floor: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=max(relative * float(expected.abs().max()), floor))


@torch.no_grad()
def test_logits(folder):
    model, reference = ours(folder), theirs(folder)
    for n in {1, 20, longest(model.config)}:
        assert_close(model(ids(n, rows=2)), reference(ids(n, rows=2)).logits, 2e-5)


@torch.no_grad()
def test_documents(folder, monkeypatch):
    model, reference = ours(folder), theirs(folder)
    lengths = [1, 17, longest(model.config), 5, 45]
    parts = ids(sum(lengths)).split(lengths, dim=1)
    expected = torch.cat([reference(part).logits for part in parts], dim=1)
    for most in (0, 2**30):  # on a CPU one after the other, and as rows of a padded batch
        monkeypatch.setattr(kernels_cpu, "TINY", most)
        assert_close(model(torch.cat(parts, dim=1), seqlens=lengths), expected, 1e-4)


@torch.no_grad()
def test_cache(folder):
    """Two texts in one cache, read in pieces whose lengths fall before, across and after a window."""
    model = ours(folder)
    switch = model.config.rope_adjustments.get("original_max_position_embeddings", 0)
    lengths = ([max(switch, 7), 1, 1, 9, 1, 20, 1, 1], [3, 1, 1, 1, 18, 1, 1, 1])
    texts = [ids(sum(n)) for n in lengths]
    cache, rows, parts = KVCache(model.config), [2, 0], []
    for pair in zip(*(text.split(n, dim=1) for text, n in zip(texts, lengths))):
        seqlens = [piece.size(1) for piece in pair]
        read = model(torch.cat(pair, dim=1), seqlens, cache, rows)
        parts.append(read.split(seqlens, dim=1))
    for text, n, pieces in zip(texts, lengths, zip(*parts)):
        ends = [0, *itertools.accumulate(n)]  # a rope that switches is another one from then on
        start = max(end for end in ends if end <= switch) if ends[-1] > switch else 0
        assert_close(torch.cat(pieces, dim=1)[:, start:], model(text)[:, start:], 1e-4)
    for layer, stored in enumerate(cache.layers):
        if model.config.is_recurrent(layer) or model.config.kv_source(layer) != layer:
            assert stored is None
            continue
        assert stored is not None and stored[0].size(2) <= (model.config.window(layer) or 512)


def test_greedy_text(folder):
    model, reference = ours(folder), theirs(folder)
    for n in (9, min(longest(model.config) // 2 + 5, 300)):
        prompt = ids(n)
        options = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, n:]
        assert list(generate(model, prompt[0].tolist(), 64)) == expected.tolist()


def test_greedy_text_of_many(folder):
    """More prompts than places, of mixed lengths: each gets the text that `transformers` gives it alone."""
    model, reference = ours(folder), theirs(folder)
    engine = Engine(model, rows=6)
    lengths = (1, 9, longest(model.config), 30, 2, 17, 5, 44, 3, 25, 55, 8, 33, 12, 51, 4, 21, 38, 6, 14)
    texts = [Request(ids(n)[0].tolist(), 4 + 7 * i % 29) for i, n in enumerate(lengths)]
    assert sorted(map(id, engine.run(texts))) == sorted(map(id, texts))
    for text in texts:
        options = {"do_sample": False, "max_new_tokens": text.max_new_tokens, "eos_token_id": None, "pad_token_id": 0}
        options["use_cache"] = model.switch is None  # its cache keeps what was rotated by the rope before the switch
        prompt = torch.tensor([text.prompt])
        expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, len(text.prompt) :]
        assert text.ids == expected.tolist() and text.finish == "length"


def test_gradients(folder):
    """Of every weight. One of which the loss does not depend, like a bias of keys without rope, has rounding alone."""
    model, reference = ours(folder), theirs(folder)
    model.requires_grad_(True)
    text = ids(50)
    for logits in (model(text), reference(text).logits):
        torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:]).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    rounding = 1e-6 * max(float(g.abs().max()) for g in gradients.values())
    seen: set[str] = set()
    for parameter in weight_map(model.config).parameters(model).values():
        for tensor in parameter.tensors:
            source, expected = find(gradients, aliases(model.config.model_type).in_memory(tensor.name))
            seen.add(source)
            if expected is not None:
                assert_close(tensor.form.from_ours(parameter.value.grad[tensor.rows]), expected, 1e-3, rounding)
    assert not gradients.keys() - seen


def find(gradients: dict[str, torch.Tensor], name: str) -> tuple[str, torch.Tensor | None]:
    """The gradient of what is stored under a name, and its own name; that of an expert is a part of a stack."""
    stack, expert = GPT_OSS.stacked(name)
    if expert is not None and stack in gradients and (name.endswith(".bias") or ".gate_up_proj." in name):
        return stack, gradients[stack][expert]
    if ".experts." not in name:
        return name, gradients.get(name)
    stem, _, tail = name.partition(".experts.")
    expert, which, _ = tail.split(".")
    if which in ("w2", "down_proj"):
        return f"{stem}.experts.down_proj", gradients[f"{stem}.experts.down_proj"][int(expert)]
    both = gradients[f"{stem}.experts.gate_up_proj"][int(expert)]
    return f"{stem}.experts.gate_up_proj", both.chunk(2)[which in ("w3", "up_proj")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written(folder, dtype, tmp_path):
    model = ours(folder, dtype)
    write_model(model, Checkpoint(folder).fields, tmp_path, Checkpoint(folder))
    before, after = tensors(folder), tensors(tmp_path)
    assert before.keys() == after.keys()
    kept = weight_map(model.config).kept
    for name, tensor in before.items():
        unchanged = kept.search(name) or name.endswith(("correction_bias", "act_fn.beta", "act_fn.eps", "layer_scalar"))
        expected = tensor if unchanged else tensor.to(dtype)
        assert after[name].dtype == expected.dtype and torch.equal(after[name], expected), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    with warnings_of_transformers() as messages:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [m for m in messages if not m.startswith("Unrecognized keys in `rope_parameters`")]  # which it reads


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


@torch.no_grad()
def test_a_drawn_model_runs(folder):
    config = Checkpoint(folder).config
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    assert bool(model(ids(30)).isfinite().all())


def test_every_family_is_here():
    from litgpt import families

    assert set(families.FAMILIES) == set(FAMILIES)


def test_the_page_for_developers_has_every_switch():
    from litgpt.families import qwen3

    page = Path(__file__).parents[1].joinpath("tutorials/developer-docs/adding-a-family.md").read_text(encoding="utf-8")
    assert [field.name for field in fields(Config) if f"`{field.name}`" not in page] == []
    assert Path(qwen3.__file__).read_text(encoding="utf-8") in page


@pytest.mark.parametrize("case", CASES)
def test_a_field_that_is_missing_has_the_default(case):
    """Each in turn; what `transformers` writes leaves out few of them. A field may also be one that must be there."""
    model_type, variant = case
    whole = complete({"model_type": model_type} | FAMILIES[model_type][variant])
    for part in filter(None, (whole, whole.get("text_config"))):
        for key in part.keys() - {"model_type", "text_config", *(() if part is whole else ("tie_word_embeddings",))}:
            gone = (key, "layer_types") if key == "num_hidden_layers" else (key,)
            fields = {k: v for k, v in part.items() if k not in gone}
            fields = fields if part is whole else whole | {"text_config": fields}
            if outcome(fields) != f"config.json lacks the field {key!r}, which {model_type!r} needs.":
                try:
                    completed = complete(fields)
                except (ZeroDivisionError, TypeError):  # EXAONE 4 computes `layer_types` from some patterns alone
                    continue
                except StrictDataclassError:  # the default does not go with the other sizes
                    assert isinstance(outcome(fields), str), key
                    continue
                assert outcome(fields) == outcome(completed), key


def outcome(fields: dict[str, Any]) -> Config | str:
    """The config, or what is wrong with it: a default may not go with the other sizes."""
    try:
        return read_config(fields)
    except UserError as e:
        return str(e)


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """`config.json` in the form of transformers 5, with all defaults."""
    from transformers import AutoConfig

    return json.loads(AutoConfig.for_model(**fields).to_json_string(use_diff=False))


@pytest.mark.parametrize(("model_type", "variant"), ALL, ids=map(" ".join, ALL))
def test_config_of_transformers_is_read(model_type, variant):
    """`config.json` in the form of transformers 5, without the defaults that it can add itself."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **FAMILIES[model_type][variant])
    full = read_config(json.loads(config.to_json_string(use_diff=False)))
    assert read_config(json.loads(config.to_json_string(use_diff=True))) == full
