"""Folders that are written from a base: every form of its weights, tied heads and own ones, stored or not."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from litgpt import LLM
from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint
from litgpt.evaluation.results import model_hashes
from litgpt.methods.lora import LoRA
from litgpt.methods.model_source import ModelSource
from litgpt.storage.outputs import SUMS, listed
from tests.conftest import save_llama
from tests.lit import lit_weights, save_lit
from tests.runs import words
from tests.test_lora import IDS, save, theirs
from tests.test_lora_variants import trained

FORMS = ("safetensors", "safetensors shards", "bin", "bin shards", "old bin", "lit_model.pth")
LIT = {
    "block_size": 256,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "intermediate_size": 44,
    "padded_vocab_size": 300,
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-6,
    "mlp_class_name": "LLaMAMLP",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
}
LORAS = {
    "layers": {},
    "embeddings": {"train_embeddings": True},
    "head": {"head": True},
    "both": {"train_embeddings": True, "head": True},
}


def in_form(base: Path, form: str, folder: Path, stored_head: bool | None = None) -> Path:
    """The same model with its weights in another form.

    Args:
        stored_head: Whether the file has the head; by default as `transformers` writes it.
    """
    weights = load_file(base / "model.safetensors")
    if stored_head is not None:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
        weights = {name: w for name, w in weights.items() if stored_head or name != "lm_head.weight"}
    if form == "lit_model.pth":
        save_lit(folder, LIT, lit_weights(base, LIT))
    else:
        folder.mkdir()
        kind, end = ("pytorch_model", ".bin") if "bin" in form else ("model", ".safetensors")
        names = sorted(weights)
        n = 3 if "shards" in form else 1
        files = {f"{kind}-{i + 1:05d}-of-{n:05d}{end}" if n > 1 else kind + end: names[i::n] for i in range(n)}
        for file, own in files.items():
            part = {name: weights[name] for name in own}
            if end == ".bin":
                torch.save(part, folder / file, _use_new_zipfile_serialization=form != "old bin")
            else:
                save_file(part, folder / file, {"format": "pt"})
        if n > 1:
            index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
            (folder / f"{kind}{end}.index.json").write_text(json.dumps(index))
        shutil.copy(base / "config.json", folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(base / file, folder)
    return folder


def check_files(folder: Path) -> None:
    """The weights are in safetensors alone, and an index names all of them or is not there."""
    assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pth") or p.name == "model_config.yaml"]
    files = {p.name for p in folder.glob("*.safetensors")}
    indexes = list(folder.glob("*.index.json"))
    if len(files) == 1:
        assert files == {"model.safetensors"} and not indexes
    else:
        (index,) = indexes
        weights = {name: file for file in files for name in load_file(folder / file)}
        assert index.name == "model.safetensors.index.json" and json.loads(index.read_text())["weight_map"] == weights


def compare(folder: Path, expected: torch.Tensor) -> None:
    """Compare with logits, in `transformers`."""
    check_files(folder)
    torch.testing.assert_close(theirs(folder)(IDS).logits, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[bool, Path]:
    """An untied model and a tied one."""
    root = tmp_path_factory.mktemp("bases")
    names = {False: "untied", True: "tied"}
    return {tied: save_llama(root / name, tokenizer_file, tie_word_embeddings=tied) for tied, name in names.items()}


@torch.no_grad()
@pytest.mark.parametrize("maker", ["ours", "peft"])
@pytest.mark.parametrize("form", FORMS)
def test_merge_into_every_form(form, maker, bases, tmp_path):
    base = in_form(bases[False], form, tmp_path / "base")
    adapter = tmp_path / "adapter"
    if maker == "ours":
        lora = LoRA(r=2)
        save(trained(bases[False], lora), lora, bases[False], adapter)
        model = PeftModel.from_pretrained(theirs(bases[False]), adapter)
    else:
        torch.manual_seed(1)
        model = get_peft_model(theirs(bases[False]), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
        model.save_pretrained(adapter)
    main(["merge_lora", str(adapter), "--base", str(base), "--out_dir", str(tmp_path / "out")])
    compare(tmp_path / "out", model.merge_and_unload()(IDS).logits)


CASES = list(itertools.product([True, False], [True, False], LORAS, ["safetensors", "safetensors shards", "bin"]))
QUICK = [case for case in CASES if case[:2] in ((True, True), (False, True)) and case[3] == "safetensors"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("tied", "stored", "what", "form"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.long) for case in CASES if case[0] or case[1]],
)
def test_merge_heads_and_embeddings(tied, stored, what, form, bases, tmp_path):
    base = in_form(bases[tied], form, tmp_path / "base", stored_head=stored)
    lora = LoRA(r=2, **LORAS[what])
    adapter = save(trained(base, lora), lora, base, tmp_path / "adapter")
    main(["merge_lora", str(adapter)])
    model = PeftModel.from_pretrained(theirs(bases[tied]), adapter)
    compare(tmp_path / "adapter-merged", model.eval()(IDS).logits)  # merged, peft adds what a tied head has to both


@torch.no_grad()
def test_merge_in_several_files(bases, tmp_path, monkeypatch):
    lora = LoRA(r=2)
    adapter = save(trained(bases[False], lora), lora, bases[False], tmp_path / "adapter")
    monkeypatch.setattr("litgpt.checkpoint.folder.SHARD", 20000)
    main(["merge_lora", str(adapter)])
    merged = tmp_path / "adapter-merged"
    assert len(list(merged.glob("*.safetensors"))) > 2
    compare(merged, PeftModel.from_pretrained(theirs(bases[False]), adapter)(IDS).logits)


def save_by_api(folder: Path, out: Path) -> None:
    LLM.load(folder).save(out)


def finetune_full(folder: Path, out: Path, rows: Path) -> None:
    """With a learning rate at which nothing changes."""
    run = out.with_name("run")
    flags = ("--train.max_steps", 2, "--optimizer.lr", 0, "--optimizer.weight_decay", 0, "--precision", "32-true")
    main(words("full", folder, rows, run, *flags))
    (run / "final").rename(out)


def to_litgpt_and_back(folder: Path, out: Path) -> None:
    if not (folder / "lit_model.pth").is_file():
        folder = shutil.copytree(folder, folder.with_name("both"))
        main(["convert_to_litgpt", str(folder)])
    main(["convert_from_litgpt", str(folder), str(out), "--model_pth", "false"])


WRITERS = {"api": save_by_api, "full": finetune_full, "litgpt": to_litgpt_and_back}
WRITTEN = [
    (writer, tied, stored, form)
    for writer, tied, stored, form in itertools.product(WRITERS, [True, False], [True, False], FORMS)
    if (tied or stored) and (form != "lit_model.pth" or stored)
]
QUICK_WRITTEN = [case for case in WRITTEN if case[1] and case[2] and case[3] in ("safetensors", "bin shards")]


@torch.no_grad()
@pytest.mark.parametrize(
    ("writer", "tied", "stored", "form"),
    [pytest.param(*case, marks=() if case in QUICK_WRITTEN else pytest.mark.long) for case in WRITTEN],
)
def test_what_others_write(writer, tied, stored, form, bases, rows_file, tmp_path):
    base = in_form(bases[tied], form, tmp_path / "base", stored_head=stored)
    extra = (rows_file,) if writer == "full" else ()
    with torch.enable_grad():
        WRITERS[writer](base, tmp_path / "out", *extra)
    compare(tmp_path / "out", theirs(bases[tied])(IDS).logits)


def test_merged_twice(bases, tmp_path, capsys):
    """The second time says so and changes nothing. Another adapter, or another precision, is another merge."""
    base, lora = bases[False], LoRA(r=2)
    adapter, out = save(trained(base, lora), lora, base, tmp_path / "adapter"), tmp_path / "adapter-merged"
    main(["merge_lora", str(adapter)])
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    capsys.readouterr()
    for path in (adapter, adapter / "adapter_model.safetensors", out):
        main(["merge_lora", str(path)])
        said = capsys.readouterr().out
        assert "merged already" in said and str(out) in said
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    for more in ([adapter, "--precision", "bf16-true"], [out, "--out_dir", tmp_path / "again"]):
        with pytest.raises(SystemExit) as stop:
            main(["merge_lora", *map(str, more)])
        assert stop.value.code == 2
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + " ")
    with pytest.raises(SystemExit) as stop:
        main(["merge_lora", str(adapter)])
    assert "is not empty" in capsys.readouterr().err


def test_nothing_about_other_weights_is_copied(bases, tmp_path):
    """Neither an index of other files, nor the checksums of a checkpoint."""
    base = in_form(bases[False], "safetensors", tmp_path / "base")
    stale = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "tf_model.h5.index.json")
    for name in (*stale, SUMS):
        (base / name).write_text('{"weight_map": {"x": "y"}, "files": {}, "step": 1}')
    lora = LoRA(r=2)
    adapter = save(trained(base, lora), lora, base, tmp_path / "adapter")
    main(["merge_lora", str(adapter)])
    found = {p.name for p in (tmp_path / "adapter-merged").iterdir()}
    assert not found & set(stale)
    assert {p.name for p in listed(tmp_path / "adapter-merged" / SUMS)} == found - {SUMS}
    assert Checkpoint(tmp_path / "adapter-merged").files.keys() == Checkpoint(base).files.keys()


@pytest.mark.parametrize("form", FORMS)
def test_hashes_of_every_form(form, bases, tmp_path):
    """What `evaluate` notes of a model names each of its files with weights."""
    folder = in_form(bases[False], form, tmp_path / "base")
    weights = {p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth")}
    assert weights < model_hashes(ModelSource.open(folder)).keys()
