"""Weights that belong to no module of ours, of a vision part or of multi-token prediction, are in every result."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from litgpt import LLM
from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint
from litgpt.families import weight_map
from tests.conftest import some
from tests.families import save_random, warnings_of_transformers
from tests.test_families_peft import save_tokenizer

EXTRA = {"num_nextn_predict_layers": 1, "preserved": {"of": ["another", "part"]}}
PROCESSOR = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
CASES = {"vision": ("gemma3", "plain"), "mtp": ("qwen3", "windows"), "mtp of experts": ("qwen3_moe", "plain")}


@pytest.fixture(scope="module", params=some(CASES, "vision", "mtp"))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("m") / "base", *CASES[request.param])
    save_tokenizer(folder)
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    weights = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    names = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "model.mtp_layers.0.input_layernorm.weight")
    weights |= {name: torch.randn(7, 5, generator=draw).bfloat16() for name in names}
    if request.param != "vision":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | EXTRA))
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps([{"instruction": "the of", "output": "a def"}] * 8))
    return path


def words(method: str, base: Path, out: Path, rows: Path, *more: str) -> list[str]:
    options = "--accelerator cpu --train.max_steps 2 --train.global_batch_size 2 --train.micro_batch_size 1"
    options += " --data.val_split_fraction 0 --eval.max_new_tokens null"
    return [*f"finetune {method} {base} --data {rows} --out_dir {out} {options}".split(), *more]


def full(base: Path, out: Path, rows: Path) -> Path:
    main(words("full", base, out, rows))
    return out / "final"


def in_bf16(base: Path, out: Path, rows: Path) -> Path:
    main(words("full", base, out, rows, "--precision", "bf16-true"))
    return out / "final"


def merged(base: Path, out: Path, rows: Path) -> Path:
    main(words("lora", base, out, rows, "--lora_targets", "all-linear"))
    adapter = load_file(out / "final" / "adapter_model.safetensors")
    assert adapter and not any("vision" in name or "mtp" in name for name in adapter)
    main(["merge_lora", str(out / "final")])
    return out / "final-merged"


def full_from_lora(base: Path, out: Path, rows: Path) -> Path:
    main(words("lora", base, out, rows))
    return full(out / "final", out / "full", rows)


def resumed(base: Path, out: Path, rows: Path) -> Path:
    with pytest.raises(SystemExit):
        main(words("full", base, out, rows, "--train.pause_after", "1"))
    (checkpoint,) = out.glob("step-*")
    check(base, checkpoint)
    main(words("full", base, out, rows, "--resume", "true"))
    return out / "final"


def converted(base: Path, out: Path, rows: Path) -> Path:
    main(["convert_from_litgpt", str(base), str(out), "--model_pth", "false"])
    return out


def saved(base: Path, out: Path, rows: Path) -> Path:
    LLM.load(base).save(out)
    return out


def on_two_devices(base: Path, out: Path, rows: Path) -> Path:
    command = [sys.executable, "-m", "litgpt", *words("full", base, out, rows, "--devices", "2", "--strategy", "fsdp")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0 and "2 x cpu (fsdp)" in result.stdout, result.stderr
    return out / "final"


WAYS: dict[str, Callable[[Path, Path, Path], Path]] = {
    way.__name__: way for way in (full, in_bf16, merged, full_from_lora, resumed, converted, saved, on_two_devices)
}


def check(base: Path, folder: Path) -> None:
    before, after = Checkpoint(base), Checkpoint(folder)
    kept = [name for name in before.files if weight_map(before.config).kept.search(name)]
    assert kept and before.files.keys() == after.files.keys()
    for name in kept:
        assert before.dtypes[name] == after.dtypes[name] and torch.equal(before.tensor(name), after.tensor(name)), name
    changed = {"dtype", "eos_token_id"}
    fields, expected = (json.loads((f / "config.json").read_text()) for f in (folder, base))
    assert {k: v for k, v in fields.items() if k not in changed} == {
        k: v for k, v in expected.items() if k not in changed
    }
    for name, content in (("processor_config.json", PROCESSOR),):
        assert json.loads((folder / name).read_text()) == content
    assert (folder / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("way", some(WAYS, "full", "merged", "resumed", "saved"))
def test_results(way, base, rows, tmp_path):
    folder = WAYS[way](base, tmp_path / "out", rows)
    check(base, folder)
    if AutoConfig.from_pretrained(base).model_type == "gemma3":
        ours, theirs = (
            AutoModelForImageTextToText.from_pretrained(f, dtype="float32").state_dict() for f in (folder, base)
        )
        vision = [name for name in theirs if "vision" in name or "projector" in name]
        assert vision and all(torch.equal(ours[name], theirs[name]) for name in vision)


def test_a_new_model_has_no_other_parts(base, tmp_path):
    """Of a model with a vision part, the text model alone is made from random weights, and its config says so."""
    (tmp_path / "texts.txt").write_text("the of a def x café " * 2000)
    options = "--train.max_tokens 256 --train.max_seq_length 64 --train.global_batch_size 4 --accelerator cpu"
    source = f"--data TextFiles --data.train_data_path {tmp_path / 'texts.txt'} --out_dir {tmp_path / 'out'}"
    main(["pretrain", str(base), *source.split(), *options.split()])
    with warnings_of_transformers() as messages:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert not messages and "ForCausalLM" in type(model).__name__
    assert Checkpoint(tmp_path / "out" / "final").config.n_layer == Checkpoint(base).config.n_layer
