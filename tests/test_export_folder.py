"""`litgpt export --to hf`: a model in another type and in files of another size, and what is compared."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.__main__ import main
from litgpt.checkpoint import folder as checkpoint
from litgpt.checkpoint.hub import PICO
from litgpt.export import folder as exported
from litgpt.methods.lora import LoRA
from litgpt.storage.outputs import SUMS, listed
from tests.test_lora import IDS, save, theirs, with_lora
from tests.test_merge import FORMS, check_files, in_form


def export(folder: Path, out: Path, *flags: object) -> int:
    try:
        main(["export", str(folder), "--to", "hf", "--out", str(out), *map(str, flags)])
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, llama, tmp_path, capsys):
    base = in_form(llama, form, tmp_path / "base")
    assert export(base, tmp_path / "out") == 0
    check_files(tmp_path / "out")
    torch.testing.assert_close(theirs(tmp_path / "out")(IDS).logits, theirs(llama)(IDS).logits, rtol=0, atol=0)
    assert "differ from the model's by at most 0.0e+00" in " ".join(capsys.readouterr().out.split())
    main(["validate", str(tmp_path / "out")])
    assert set(listed(tmp_path / "out" / SUMS)) == {p for p in (tmp_path / "out").iterdir() if p.name != SUMS}


@torch.no_grad()
@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("parity", ["answers", "tensors"])
def test_types(type, parity, llama, tmp_path, capsys, monkeypatch):
    """Weights are converted, and large ones compared, some rows at a time."""
    monkeypatch.setattr(checkpoint, "PART", 100)
    monkeypatch.setattr(exported, "READ", 2000)
    assert export(llama, tmp_path / "out", "--type", type, "--parity", parity) == 0
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[type]
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight.to(dtype), rtol=0, atol=0)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["dtype"] == str(dtype).removeprefix("torch.") and "torch_dtype" not in fields
    found = re.search(r"differ.* by at most (\S+) of", " ".join(capsys.readouterr().out.split()))
    assert found and (float(found[1]) == 0) == (type == "f32") and float(found[1]) < 0.1
    assert (tmp_path / "out" / "parity.json").is_file() == (parity == "answers")


@torch.no_grad()
def test_shards_of_an_adapter(tmp_path, capsys):
    """An adapter is merged. Its base has other files of weights than the result."""
    lora = LoRA(r=2)
    save(with_lora(PICO, lora), lora, PICO, tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out", "--type", "f32", "--shard_size", "1.5MB") == 0
    check_files(tmp_path / "out")
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == 3 and max(sizes) < 1.6e6
    main(["merge_lora", str(tmp_path / "adapter"), "--precision", "32-true"])
    merged = load_file(tmp_path / "adapter-merged" / "model.safetensors")
    parts = [load_file(p) for p in (tmp_path / "out").glob("*.safetensors")]
    assert {name for part in parts for name in part} == merged.keys()
    assert all(torch.equal(merged[name], weight) for part in parts for name, weight in part.items())
    assert "3 files of weights" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("parity", ["answers", "tensors"])
def test_numbers_that_a_type_cannot_hold(parity, llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "base")
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert export(tmp_path / "base", tmp_path / "out", "--type", "f16", "--parity", parity) == 2
    assert "bf16" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert export(tmp_path / "base", tmp_path / "out", "--type", "bf16", "--parity", parity) == 0


def test_other_numbers_than_those_of_the_model(llama, tmp_path, capsys, monkeypatch):
    write = exported.write_weights

    def damaged(weights, tensors, *more):
        write(weights, ((n, t + 0.1 * n.endswith("layers.1.mlp.up_proj.weight")) for n, t in tensors), *more)

    monkeypatch.setattr(exported, "write_weights", damaged)
    assert export(llama, tmp_path / "out", "--parity", "tensors") == 2
    assert "layers.1.mlp.up_proj" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert export(llama, tmp_path / "out", "--parity", "answers") == 0
    assert "at most 0.0e" not in " ".join(capsys.readouterr().out.split())


def test_refused(llama, tmp_path, capsys):
    for flags, expected in {
        ("--type", "q8_0"): "q8_0",
        ("--shard_size", "5"): "--shard_size",
        ("--shard_size", "1kB"): "--shard_size",
        ("--shard_size", "-5GB"): "--shard_size",
        ("--private",): "--private",
    }.items():
        assert export(llama, tmp_path / "out", *flags) == 2
        assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert export(llama, llama, "--overwrite") == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert export(llama, tmp_path / "out", "--overwrite") == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
