"""LoRA is that of `peft`: logits of exported and of imported adapters, loss curves, merged folders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.errors import UserError
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.lora import TARGETS, Dropout, LoRA, lora_layers
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_export import write_lora
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from tests.conftest import save_llama

CPU = torch.device("cpu")
IDS = torch.randint(2, 300, (2, 60), generator=torch.Generator().manual_seed(0))
TARGET_SETS = [{t} for t in TARGETS] + [{"query", "value"}, {"key", "mlp"}, set(TARGETS)]


def with_lora(folder: Path, lora: LoRA, seed: int = 0) -> GPT:
    """The model of `folder` with an adapter that is not zero."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = GPT(Checkpoint(folder).config)
    lora.apply(model)
    load_weights(model, Checkpoint(folder), torch.float32, CPU)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


def flags(targets: set[str]) -> dict[str, bool]:
    return {t: t in targets for t in TARGETS}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("m") / "base"
    return save_llama(folder, tokenizer_file, tie_word_embeddings=request.param, attention_bias=True)


def theirs(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(model: GPT, lora: LoRA, base: Path, folder: Path) -> Path:
    folder.mkdir()
    write_lora(lora, model, str(base), folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((base / file).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("options", "leaves"),
    [
        ({}, {"in_qkv": (True, False, True)}),
        ({"value": False}, {"in_qkv": (True, False, False)}),
        ({"key": True}, {"in_qkv": (True, True, True)}),
        ({"query": False, "value": False, "projection": True}, {"in_gate": (True,), "out": (True,)}),
        ({"targets": "in_proj_b"}, {"in_beta": (True,)}),
        ({"targets": "in_proj_qkv"}, {"in_qkv": (True, True, True)}),
        (
            {"targets": "all-linear"},
            {"in_qkv": (True,) * 3} | dict.fromkeys(("in_gate", "in_beta", "in_step", "out"), (True,)),
        ),
    ],
)
def test_switches_of_a_gated_delta_net(options, leaves):
    """Only the pattern and all-linear reach the two small layers."""
    with torch.device("meta"):
        model = GPT(replace(Config.from_name("Qwen3.5-0.8B"), n_layer=1))
    LoRA(**options).apply(model)
    found = {name.partition(".attn.")[2]: m.adapted for name, m in lora_layers(model).items() if ".attn." in name}
    assert found == leaves


@torch.no_grad()
@pytest.mark.parametrize("targets", TARGET_SETS, ids=lambda targets: "+".join(sorted(targets)))
def test_export_and_merge(base, targets, tmp_path):
    lora = LoRA(r=3, alpha=5, **flags(targets))
    model = with_lora(base, lora)
    expected = model(IDS)
    assert (expected - ModelSource.open(base).model(torch.float32, CPU)(IDS)).abs().max() > 0.1
    folder = save(model, lora, base, tmp_path / "adapter")

    in_peft = PeftModel.from_pretrained(theirs(base), folder).eval()(IDS).logits
    torch.testing.assert_close(in_peft, expected, rtol=0, atol=1e-4)
    again = ModelSource.open(folder).model(torch.float32, CPU)(IDS)
    assert torch.equal(again, expected)

    main(["merge_lora", str(folder)])
    merged = tmp_path / "adapter-merged"
    torch.testing.assert_close(theirs(merged)(IDS).logits, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(ModelSource.open(merged).model(torch.float32, CPU)(IDS), expected, rtol=0, atol=1e-3)
    fields, before = (json.loads((f / "config.json").read_text()) for f in (merged, base))
    untied = before["tie_word_embeddings"] and "head" in targets
    assert fields == before | ({"tie_word_embeddings": False} if untied else {})


@torch.no_grad()
@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj", "down_proj"], "all-linear"])
def test_adapters_of_peft(base, modules, tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(theirs(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"lora_dropout": 0.1})
    )
    ours = ModelSource.open(tmp_path / "adapter", base=base).model(torch.float32, CPU)
    torch.testing.assert_close(ours(IDS), model(IDS).logits, rtol=0, atol=1e-4)


def test_training_starts_from_the_base(base):
    lora = LoRA(**flags(set(TARGETS)))
    with torch.device("meta"):
        model = GPT(Checkpoint(base).config)
    lora.apply(model)
    load_weights(model, Checkpoint(base), torch.float32, CPU)
    plain = ModelSource.open(base).model(torch.float32, CPU)
    assert torch.equal(model.eval()(IDS), plain(IDS))


def test_precision_of_the_parts(base):
    with torch.device("meta"):
        model = GPT(Checkpoint(base).config)
    LoRA().apply(model)
    load_weights(model, Checkpoint(base), torch.bfloat16, CPU)
    kinds = {("lora_" in n, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    assert kinds == {(True, torch.float32, True), (False, torch.bfloat16, False)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "some"}, "bias 'some'"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"alpha_pattern": {"q_proj": "much"}}, r"alpha_pattern\..q_proj.: "),
        ({"r": None}, "no usable r"),
        ({"r": 0}, "adapter_config.json: r: "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),  # its base is not the one that is recorded
    ],
)
def test_what_is_not_supported_is_refused(base, change, message, tmp_path):
    lora = LoRA(r=2)
    folder = save(with_lora(base, lora), lora, base, tmp_path / "adapter")
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | change))
    with pytest.raises(UserError, match=message):
        open_adapter(folder)


def test_adapter_of_another_model(base, tmp_path, tokenizer_file):
    lora = LoRA(r=2)
    folder = save(with_lora(base, lora), lora, base, tmp_path / "adapter")
    other = save_llama(tmp_path / "other", tokenizer_file, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"does not fit the model: model.layers.1.self_attn.q_proj"):
        ModelSource.open(folder, base=other).model(torch.float32, CPU)
    with pytest.raises(UserError, match="--base DIR"):
        (folder / "adapter_config.json").write_text(
            (folder / "adapter_config.json").read_text().replace(str(base), "/nowhere")
        )
        ModelSource.open(folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="--base DIR"):
        ModelSource.open(folder)


def test_merge_takes_the_adapter_file_and_a_precision(base, tmp_path):
    lora = LoRA(r=2)
    folder = save(with_lora(base, lora), lora, base, tmp_path / "adapter")
    out = tmp_path / "out"
    main(["merge_lora", str(folder / "adapter_model.safetensors"), "--out_dir", str(out), "--precision", "bf16-true"])
    assert set(Checkpoint(out).dtypes.values()) == {"BF16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_replaces_nothing_but_a_model(base, tmp_path, capsys):
    lora = LoRA(r=2)
    run = tmp_path / "run"
    run.mkdir()
    folder = save(with_lora(base, lora), lora, base, run / "final")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out, message in ((run, "Choose another folder"), (tmp_path / "other", "notes.txt")):
        with pytest.raises(SystemExit) as stop:
            main(["merge_lora", str(folder), "--out_dir", str(out), "--overwrite", "true"])
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    main(["merge_lora", str(folder)])
    main(["merge_lora", str(folder), "--overwrite", "true"])


def test_dropout_is_torchs():
    """As many inputs are dropped, independently of each other, and what is left keeps the mean."""
    torch.manual_seed(0)
    x = torch.ones(3, 1001, 101, requires_grad=True)
    for p in (0.05, 0.5):
        layer = Dropout(p)
        y = layer(x)
        kept = y != 0
        deviation = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(1 - kept.double().mean() - p) < 4 * deviation
        pairs = (kept[..., 1:] & kept[..., :-1]).double().mean()  # neighbours, some of which share a drawn number
        assert abs(pairs - (1 - p) ** 2) < 8 * deviation
        assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)), rtol=1e-4)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach()), "the same are dropped on the way back"
        assert not torch.equal(layer(x), y)
        torch.manual_seed(0)
        again = layer(x)
        torch.manual_seed(0)
        assert torch.equal(again, layer(x)) and torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert Dropout(0.5)(x.detach().bfloat16()[0, :3, :5]).dtype == torch.bfloat16
