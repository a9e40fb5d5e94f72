"""Weights in `pytorch_model.bin`: the model is that of the safetensors, and nothing in the file is run."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint
from litgpt.errors import UserError


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A model without weights."""
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


def save(folder: Path, weights: dict[str, torch.Tensor], form: str) -> None:
    """As one file, as shards, or in the form before torch 1.6; with a buffer that old folders have."""
    weights = {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if form != "shards":
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "one")
        return
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, own in parts.items():
        torch.save({n: weights[n] for n in own}, folder / file)
    index = {"weight_map": {n: file for file, own in parts.items() for n in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["one", "shards", "old"])
def test_the_same_model(form, folder, llama, capsys):
    weights = load_file(llama / "model.safetensors")
    save(folder, weights, form)
    checkpoint = Checkpoint(folder)
    assert all(torch.equal(checkpoint.tensor(name), weight) for name, weight in weights.items())
    assert {checkpoint.dtypes[name] for name in weights} == {"F32"}
    outputs = []
    for model in (folder, llama):
        main(["generate", str(model), "--prompt", "the", "--max_new_tokens", "8", "--temperature", "0"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_safetensors_come_first(folder, llama):
    shutil.copyfile(llama / "model.safetensors", folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert Checkpoint(folder).shards() == [folder / "model.safetensors"]


class Harm:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(zipped, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harm()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="requires code"):
        Checkpoint(folder)
    assert not Path("harm").exists()


def test_damaged_files(folder, llama):
    file = folder / "pytorch_model.bin"
    save(folder, load_file(llama / "model.safetensors"), "one")
    whole = file.read_bytes()
    for data in (whole[:-200], whole[:100], b"", pickle.dumps([1]), b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"pytorch_model\.bin (is damaged|does not contain)"):
            Checkpoint(folder)
    torch.save([torch.ones(2)], file)
    with pytest.raises(UserError, match="does not contain named tensors"):
        Checkpoint(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        Checkpoint(folder)
