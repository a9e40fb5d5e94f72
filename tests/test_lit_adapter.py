"""LitGPT's LoRA and adapters, written by hand from its documentation, give the models that they mean."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from litgpt.checkpoint.folder import load_weights
from litgpt.litgpt_format.folder import LitCheckpoint
from litgpt.methods.adapter import LLaMAAdapter, Prefix
from litgpt.methods.adapter_folder import LitPrefixFolder, write_adapter
from litgpt.methods.model_source import ModelSource
from litgpt.model.gpt import GPT
from tests.conftest import save_llama
from tests.families import save_random
from tests.lit import MODELS, by_group, config_fields, lit_weights, save_lit
from tests.test_families_peft import save_tokenizer
from tests.test_lit_folder import assert_same, command, ours, theirs

R, ALPHA = 3, 7
SWITCHES = ("query", "key", "value", "projection", "mlp", "head")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base in LitGPT's form, and its weights."""
    made: dict[tuple[str, bool], tuple[Path, dict[str, torch.Tensor]]] = {}

    def folder(model: str, old: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
        if (model, old) not in made:
            path = tmp_path_factory.mktemp("lit")
            hf = save_random(path / "hf", *MODELS[model][:2])
            weights = lit_weights(hf, config_fields(model), old)
            made[model, old] = save_lit(path / "base", config_fields(model), weights), weights
        return made[model, old]

    return folder


def drawn(*shape: int, seed: int = 0, std: float = 0.3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * std


def qkv_rows(fields: dict[str, Any]) -> list[int]:
    size = fields.get("head_size") or fields["n_embd"] // fields["n_head"]
    return [fields["n_head"] * size, fields["n_query_groups"] * size, fields["n_query_groups"] * size]


def save_lora(
    folder: Path, base: Path, weights: dict[str, torch.Tensor], fields: dict[str, Any], on: set[str], old: bool = False
) -> dict[str, torch.Tensor]:
    """A LoRA of LitGPT's, and the weights of the base with it folded in."""
    folder.mkdir(parents=True)
    lora, merged = {}, dict(weights)
    rows = qkv_rows(fields)
    for i, (name, weight) in enumerate(weights.items()):
        module = name.removesuffix(".weight")
        kind = (
            "projection" if ".attn.proj" in name else "mlp" if ".mlp." in name else "head" if "lm_head" in name else ""
        )
        if not name.endswith(".weight") or "norm" in name or "ln_f" in name or "wte" in name:
            continue
        if ".attn.qkv" in name or ".attn.attn" in name:
            adapted = [x in on for x in SWITCHES[:3]]
            if not any(adapted):
                continue
            sizes = [n for n, x in zip(rows, adapted) if x]
            a, b = drawn(R * len(sizes), weight.size(1), seed=i), drawn(sum(sizes), R, seed=i + 1)
            parts = iter([bb @ aa for aa, bb in zip(a.split(R), b.split(sizes))])
            update = [next(parts) if x else torch.zeros(n, weight.size(1)) for n, x in zip(rows, adapted)]
            delta = by_group(*update, fields) if old else torch.cat(update)
        elif kind in on:
            a, b = drawn(R, weight.size(1), seed=i), drawn(len(weight), R, seed=i + 1)
            delta = b @ a
        else:
            continue
        lora |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        merged[name] = weight + ALPHA / R * delta
    torch.save({"model": lora}, folder / "lit_model.pth.lora")
    settings = {"checkpoint_dir": str(base), "lora_r": R, "lora_alpha": ALPHA, "lora_dropout": 0.1, "precision": None}
    settings |= {f"lora_{x}": x in on for x in SWITCHES}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    return merged


@pytest.mark.parametrize("on", [{"query", "value"}, {"key", "mlp"}, set(SWITCHES)], ids=lambda on: "-".join(sorted(on)))
@pytest.mark.parametrize("model", ["llama", "gpt_neox", "phi3", "mixtral", "gemma"])
def test_lora(model, on, base, tmp_path):
    folder, weights = base(model)
    fields = config_fields(model)
    merged = save_lora(tmp_path / "lora", folder, weights, fields, on)
    expected = ours(save_lit(tmp_path / "merged", fields, merged))
    assert_same(ours(tmp_path / "lora"), expected, 2e-5)
    assert (expected - ours(folder)).abs().max() > 0.1


def test_lora_from_before(base, tmp_path):
    folder, weights = base("llama", old=True)
    merged = save_lora(tmp_path / "lora", folder, weights, config_fields("llama"), {"query", "value"}, old=True)
    assert_same(ours(tmp_path / "lora"), ours(save_lit(tmp_path / "merged", config_fields("llama"), merged)), 2e-5)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "merged beside"])
def test_merge_lora(beside, tmp_path, tokenizer_file, capsys):
    """The result is a Hugging Face folder. LitGPT leaves a merged model beside its LoRA, which is what others read."""
    hf = save_llama(tmp_path / "hf", tokenizer_file)
    assert command(capsys, "convert_to_litgpt", hf)[0] == 0
    weights = torch.load(hf / "lit_model.pth")
    fields = yaml.safe_load((hf / "model_config.yaml").read_text())
    folder = save_lit(tmp_path / "base", fields, weights)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    merged = save_lora(tmp_path / "lora", folder, weights, fields, {"query", "value", "mlp", "head"})
    (tmp_path / "lora" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "lora" / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    if beside:
        torch.save({n: t * 0.5 for n, t in merged.items()}, tmp_path / "lora" / "lit_model.pth")
        (tmp_path / "lora" / "model_config.yaml").write_text(yaml.safe_dump(fields))
        half = {n: t * 0.5 for n, t in merged.items()}
        assert torch.equal(ours(tmp_path / "lora"), ours(save_lit(tmp_path / "half", fields, half)))
    code, out, err = command(capsys, "merge_lora", tmp_path / "lora", "--out_dir", tmp_path / "out")
    assert code == 0, err
    assert "parity" in out
    expected = ours(save_lit(tmp_path / "expected", fields, merged))
    assert_same(ours(tmp_path / "out"), expected, 2e-5)
    assert_same(theirs(tmp_path / "out"), expected, 2e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert ModelSource.open(tmp_path / "out").style().name == "alpaca"


def test_lora_that_does_not_fit(base, tmp_path, capsys):
    folder, weights = base("llama")
    save_lora(tmp_path / "lora", folder, weights, config_fields("llama"), {"query", "value"})
    settings = yaml.safe_load((tmp_path / "lora" / "hyperparameters.yaml").read_text())

    def message(**changes: Any) -> str:
        (tmp_path / "lora" / "hyperparameters.yaml").write_text(yaml.safe_dump(settings | changes))
        code, _, err = command(capsys, "merge_lora", tmp_path / "lora", "--out_dir", tmp_path / "out")
        assert code == 2 and err.count("\n") == 1
        return err

    assert "does not match the model and its hyperparameters.yaml" in message(lora_key=True)
    assert "does not match the model" in message(lora_r=4)
    assert "hyperparameters.yaml: lora_r: " in message(lora_r="many")
    assert "hyperparameters.yaml: lora_r: " in message(lora_r=0)
    assert "--base DIR" in message(checkpoint_dir="gone")
    assert "--base DIR" in message(checkpoint_dir=None)
    (tmp_path / "lora" / "hyperparameters.yaml").unlink()
    code, _, err = command(capsys, "generate", tmp_path / "lora")
    assert code == 2 and "no usable lora_r" in err
    code, _, err = command(capsys, "convert_from_litgpt", tmp_path / "lora", tmp_path / "out")
    assert code == 2 and "is an adapter" in err
    code, _, err = command(capsys, "finetune", "lora", tmp_path / "lora", "--data", "JSON", "--data.json_path", "x")
    assert code == 2 and "no usable lora_r" in err


def test_lora_is_trained_further(base, rows_file, tmp_path, capsys):
    """A step of nothing keeps it, in PEFT's format."""
    folder, weights = base("llama")
    folder = shutil.copytree(folder, tmp_path / "base")
    save_tokenizer(folder)
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    save_lora(tmp_path / "lora", folder, weights, config_fields("llama"), {"query", "value"})
    data = [
        "--data",
        "JSON",
        "--data.json_path",
        rows_file,
        "--data.val_split_fraction",
        "0.1",
        "--precision",
        "32-true",
    ]
    nothing = ["--train.max_steps", "1", "--optimizer.lr", "0", "--optimizer.weight_decay", "0"]
    out = ["--out_dir", tmp_path / "out", "--accelerator", "cpu", "--eval.max_new_tokens", "null"]
    code, _, err = command(capsys, "finetune", "lora", tmp_path / "lora", *data, *nothing, *out)
    assert code == 0, err
    assert_same(ours(tmp_path / "out" / "final"), ours(tmp_path / "lora"), 2e-5)


def save_prefixes(folder: Path, base: Path, model: str, start: int = 1) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    fields = config_fields(model)
    weights = {}
    for layer in range(start, fields["n_layer"]):
        weights[f"transformer.h.{layer}.attn.adapter_wte.weight"] = drawn(5, fields["n_embd"], seed=layer, std=1.0)
        weights[f"transformer.h.{layer}.attn.gating_factor"] = drawn(1, 1, fields["n_head"], 1, seed=layer, std=1.0)
    torch.save({"model": weights}, folder / "lit_model.pth.adapter")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(base)}))
    return weights


def our_adapter(folder: Path, base: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The same prefixes in a folder of ours, where they are those of the paper."""
    adapter, checkpoint = LLaMAAdapter(5, 1), LitCheckpoint(base)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    adapter.apply(model)
    load_weights(model, checkpoint, torch.float32, torch.device("cpu"))
    for layer, block in enumerate(model.transformer.h):
        if block.attn.prefix is not None:
            name = f"transformer.h.{layer}.attn."
            block.attn.prefix.embedding.data = weights[name + "adapter_wte.weight"]
            block.attn.prefix.gate.data = weights[name + "gating_factor"].flatten()
    folder.mkdir()
    write_adapter(adapter, model, str(base), folder)
    return folder


def test_adapter_from_before(base, tmp_path, capsys):
    """The gates of old files have another shape, and their prefixes are those of the paper."""
    folder, _ = base("llama", old=True)
    weights = save_prefixes(tmp_path / "adapter", folder, "llama")
    expected = ours(our_adapter(tmp_path / "ours", folder, weights))
    old = {n: t.transpose(1, 2) if t.dim() == 4 else t for n, t in weights.items()}
    torch.save(old, tmp_path / "adapter" / "lit_model.pth.adapter")
    capsys.readouterr()
    assert_same(ours(tmp_path / "adapter"), expected)
    assert capsys.readouterr().err == ""
    assert (expected - ours(folder)).abs().max() > 0.01


def test_rows_of_the_prefix(base, tmp_path, capsys):
    """LitGPT takes key and value of a group where they were in the order of `attn.attn`."""
    folder, weights = base("llama")
    save_prefixes(tmp_path / "adapter", folder, "llama")
    code, _, err = command(capsys, "generate", tmp_path / "adapter")
    assert code == 2 and "no tokenizer" in err
    capsys.readouterr()
    model = ModelSource.open(tmp_path / "adapter").model(torch.float32, torch.device("cpu"))
    assert "lit_model.pth.adapter" in capsys.readouterr().err
    attention = model.transformer.h[1].attn
    assert isinstance(attention.prefix, Prefix)
    fields, q = config_fields("llama"), drawn(2, 4, 6, 8)
    fused = attention.prefix.embedding @ weights["transformer.h.1.attn.qkv.weight"].T  # (P, 8 heads of 8)
    heads = fused.view(5, 2, 4, 8)  # two groups of two queries, a key and a value
    for head in range(fields["n_head"]):
        k, v = heads[:, head // 2, 2], heads[:, head // 2, 3]
        expected = attention.prefix.gate[head] * ((q[:, head] @ k.T / 8**0.5).softmax(-1) @ v)
        found = attention.prefix(q, attention.qkv, attention.config.qkv_sizes)[:, head]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("old", [False, True], ids=["qkv", "attn.attn"])
def test_adapter_v2(old, base, tmp_path):
    """Scales and biases folded into a model that has biases everywhere but in its head give the same logits."""
    folder, weights = base("gpt_neox", old)
    fields = config_fields("gpt_neox")
    save_prefixes(tmp_path / "adapter", folder, "gpt_neox", start=2)
    state = torch.load(tmp_path / "adapter" / "lit_model.pth.adapter")["model"]
    (tmp_path / "adapter" / "lit_model.pth.adapter").unlink()
    state["transformer.h.2.attn.gating_factor"].zero_()
    folded = dict(weights)
    for i, (name, weight) in enumerate(weights.items()):
        module, _, leaf = name.rpartition(".")
        if "norm" in name or "ln_f" in name:
            state[name] = folded[name] = weight + drawn(*weight.shape, seed=i)
        elif leaf == "weight" and "wte" not in name:
            scale, bias = 1 + drawn(len(weight), seed=i), drawn(len(weight), seed=i + 1)
            bias = bias * (module != "lm_head")
            state |= {f"{module}.adapter_scale": scale, f"{module}.adapter_bias": bias}
            folded[name] = weight * scale[:, None]
            if module != "lm_head":
                folded[f"{module}.bias"] = scale * (weights[f"{module}.bias"] + bias)
    torch.save({"model": state}, tmp_path / "adapter" / "lit_model.pth.adapter_v2")
    assert_same(ours(tmp_path / "adapter"), ours(save_lit(tmp_path / "folded", fields, folded)))
    assert ModelSource.open(tmp_path / "adapter").adapter.description == "LLaMA-Adapter V2 of 5 tokens, made by LitGPT"


def test_adapter_v2_of_experts(base, tmp_path):
    """Routers have a scale and a bias as well. Those of experts are of two layers each."""
    folder, weights = base("mixtral")
    state = save_prefixes(tmp_path / "adapter", folder, "mixtral")
    (tmp_path / "adapter" / "lit_model.pth.adapter").unlink()
    for i, (name, weight) in enumerate(weights.items()):
        if "norm" in name or "ln_f" in name:
            state[name] = weight
        elif "wte" not in name:
            module = name.removesuffix(".weight")
            state[f"{module}.adapter_scale"] = 1 + drawn(len(weight), seed=i)
            state[f"{module}.adapter_bias"] = drawn(len(weight), seed=i + 1)
    torch.save(state, tmp_path / "adapter" / "lit_model.pth.adapter_v2")
    model = ModelSource.open(tmp_path / "adapter").model(torch.float32, torch.device("cpu"))
    x = drawn(7, 32)
    moe, start = model.transformer.h[1].mlp, "transformer.h.1.mlp."
    y = []
    for module in ("gate", "experts.3.fc_1", "experts.3.fc_2"):
        scale, bias = (state[f"{start}{module}.adapter_{leaf}"] for leaf in ("scale", "bias"))
        y.append(scale * (x @ weights[f"{start}{module}.weight"].T + bias))
    torch.testing.assert_close(moe.gate(x), y[0])
    torch.testing.assert_close(moe.experts[3].fc(x), torch.cat(y[1:], dim=1))


def test_adapters_that_do_not_fit(base, tmp_path, capsys):
    folder, _ = base("llama")
    weights = save_prefixes(tmp_path / "adapter", folder, "llama")
    file = tmp_path / "adapter" / "lit_model.pth.adapter"

    def message(state: object) -> str:
        torch.save(state, file)
        (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r".+") as e:
            LitPrefixFolder(file)
            ours(tmp_path / "adapter")
        return str(e.value)

    gate = "transformer.h.2.attn.gating_factor"
    assert f"{gate} is missing" in message({n: t for n, t in weights.items() if n != gate})
    assert "x is unknown" in message(weights | {"x": torch.ones(1)})
    assert f"{gate} (8,) instead of (4,)" in message(weights | {gate: torch.ones(1, 1, 8, 1)})
    assert "has no adapter_wte" in message({gate: weights[gate]})
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="damaged"):
        LitPrefixFolder(file)
    assert load_file(file)
