"""`litgpt validate` says of a folder whether it answers as when it was written and, if not, what exactly moved."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.__main__ import main
from litgpt.generate.reference_outputs import PROMPTS
from tests.conftest import save_llama

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def finetuned(tokenizer_file: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with `final/` and `final-merged/`, sealed in float32. Read only."""
    folder = tmp_path_factory.mktemp("parity")
    base = save_llama(folder / "base", tokenizer_file)
    words = (
        f"finetune lora {base} --data JSON --data.json_path {rows_file} --data.prompt_style alpaca "
        f"--out_dir {folder}/out --precision 32-true --accelerator cpu --train.max_steps 2 --train.lr_warmup_steps 0 "
        "--optimizer.lr 0.05 --eval.initial_validation false --eval.final_validation false --eval.max_new_tokens null"
    )
    main(words.split())
    main(["merge_lora", f"{folder}/out/final"])
    return folder / "out"


@pytest.fixture(params=["final", "final-merged"])
def folder(request: pytest.FixtureRequest, finetuned: Path, tmp_path: Path) -> Path:
    """A copy of the adapter's folder, then of the merged one."""
    return shutil.copytree(finetuned / request.param, tmp_path / request.param)


@pytest.fixture
def adapter(finetuned: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finetuned / "final", tmp_path / "final")


@pytest.fixture
def merged(finetuned: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finetuned / "final-merged", tmp_path / "final-merged")


@pytest.fixture
def moved(capsys: pytest.CaptureFixture) -> Callable[..., dict[str, str]]:
    """What `litgpt validate` says has moved, with its reason."""

    def run(folder: Path, *flags: str) -> dict[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["validate", str(folder), "--accelerator", "cpu", *flags])
        out, err = capsys.readouterr()
        found = dict(re.findall(r"^changed {5}(\w+): (.+)", out, re.M))
        assert stop.value.code == 2 and "complete and usable" not in out
        assert str(folder) in err and err.endswith(f": {', '.join(sorted(found))}.\n")
        return found

    return run


@pytest.fixture
def valid(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What `litgpt validate` prints about a folder that is as it was."""

    def run(folder: Path, *flags: str) -> str:
        capsys.readouterr()
        main(["validate", str(folder), "--accelerator", "cpu", *flags])
        out, err = capsys.readouterr()
        assert (
            err == "" and not re.search("^changed", out, re.M) and out.endswith("The folder is complete and usable.\n")
        )
        return out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The one line of a command that must fail."""

    def run(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(w) for w in words])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("litgpt: error: ") and err.count("\n") == 1
        return err

    return run


def change_json(file: Path, change: Callable[[dict], None]) -> None:
    fields = json.loads(file.read_text(encoding="utf-8"))
    change(fields)
    file.write_text(json.dumps(fields), encoding="utf-8")


def change_weights(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(name, w).contiguous() for name, w in load_file(file).items()}, file, {"format": "pt"})


def test_fresh_folders(finetuned, valid):
    text = valid(finetuned / "final")
    assert "LoRA of rank 8 over" in text and "prompts     alpaca" in text
    assert f"{len(PROMPTS)} prompts give their recorded outputs" in text
    assert f"{len(PROMPTS)} prompts give their recorded outputs" in valid(finetuned / "final-merged")


def test_folder_without_reference_outputs(finetuned, valid):
    assert "no reference outputs" in valid(finetuned.parent / "base")


@pytest.mark.parametrize(
    "text",
    ["prompt_style: none\n", json.dumps({"prompt_style": "chat", "template": TEMPLATE, "variables": {}})],
    ids=["another style", "a chat template"],
)
def test_template(folder, moved, text):
    (folder / "prompt_style.yaml").write_text(text)
    found = moved(folder)
    assert set(found) == {"template"} and "was rendered as" in found["template"]


def test_lost_prompt_style(folder, moved):
    (folder / "prompt_style.yaml").unlink()
    assert set(moved(folder)) == {"template"}


def swap(fields: dict) -> None:
    vocabulary = fields["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def no_bos(fields: dict) -> None:
    fields["post_processor"] = None


def eos_behind(fields: dict) -> None:
    fields["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    fields["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}


def lowercase(fields: dict) -> None:
    fields["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [swap, no_bos, eos_behind, lowercase], ids=lambda change: change.__name__)
def test_tokenizer(folder, moved, change):
    change_json(folder / "tokenizer.json", change)
    found = moved(folder)
    assert set(found) == {"tokenizer"} and "the ids of" in found["tokenizer"]


def test_adapter_weights(adapter, moved):
    change_weights(
        adapter / "adapter_model.safetensors",
        lambda name, w: w * (1.5 if "layers.1" in name and "lora_B" in name else 1),
    )
    found = moved(adapter)
    assert set(found) == {"weights"} and re.search(r"logits after .* differ by", found["weights"])


def test_adapter_scale(adapter, moved):
    change_json(adapter / "adapter_config.json", lambda fields: fields.update(lora_alpha=24))
    assert set(moved(adapter)) == {"weights"}


def test_another_base(adapter, moved, tokenizer_file, tmp_path):
    other = save_llama(tmp_path / "other", tokenizer_file, seed=1)
    assert set(moved(adapter, "--base", str(other))) == {"weights"}


def test_merged_weights(merged, moved):
    change_weights(
        merged / "model.safetensors",
        lambda name, w: w * (1.5 if name.endswith("layers.1.self_attn.q_proj.weight") else 1),
    )
    assert set(moved(merged)) == {"weights"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cast_weights(merged, moved, dtype):
    change_weights(merged / "model.safetensors", lambda name, w: w.to(dtype))
    found = moved(merged)
    assert set(found) == {"precision"} and "were F32" in found["precision"]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_computed_in_another_precision(adapter, moved, precision):
    found = moved(adapter, "--precision", precision)
    assert set(found) == {"precision"} and "was F32" in found["precision"]


def test_another_name_for_the_same_precision(adapter, valid):
    valid(adapter, "--precision", "32-true")


def test_several_at_once(adapter, moved):
    (adapter / "prompt_style.yaml").write_text("prompt_style: none\n")
    change_json(adapter / "tokenizer.json", swap)
    change_weights(adapter / "adapter_model.safetensors", lambda name, w: w * 1.5)
    assert set(moved(adapter)) == {"template", "tokenizer", "weights"}


def test_weights_that_are_no_numbers(adapter, fails):
    change_weights(adapter / "adapter_model.safetensors", lambda name, w: w * float("nan"))
    assert "gives NaN or infinite logits" in fails("validate", adapter)


def test_base_that_moved(adapter, fails, valid, finetuned):
    change_json(adapter / "adapter_config.json", lambda fields: fields.update(base_model_name_or_path="/not/here"))
    assert "is not at '/not/here'" in fails("validate", adapter)
    valid(adapter, "--base", str(finetuned.parent / "base"))


@pytest.mark.parametrize("command", ["validate", "generate", "merge_lora"])
@pytest.mark.parametrize("n_bytes", [0, 5, 100, -20])
def test_truncated_adapter(adapter, fails, command, n_bytes):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:n_bytes])
    error = fails(command, adapter)
    assert str(file) in error and "damaged" in error


@pytest.mark.parametrize("command", ["validate", "generate", "merge_lora"])
def test_missing_adapter(adapter, fails, command):
    (adapter / "adapter_model.safetensors").unlink()
    message = fails(command, adapter)
    assert str(adapter) in message and "adapter_model.safetensors" in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"computed": "F32"}'])
def test_damaged_seal(adapter, fails, text):
    (adapter / "parity.json").write_text(text)
    assert str(adapter / "parity.json") in fails("validate", adapter)


def test_greedy_text_and_damaged_seals(adapter, capsys):
    file = adapter / "parity.json"
    seal = json.loads(file.read_text())
    changes = {
        "Changed: weights": {"prompts": [seal["prompts"][0] | {"greedy": [7] * 8}]},
        "parity.json is damaged": {"prompts": []},
        "parity.json: prompts[0].prompt": {"prompts": [{}]},
        "parity.json: computed": {"computed": "F64"},
    }
    for message, change in changes.items():
        file.write_text(json.dumps(seal | change))
        with pytest.raises(SystemExit) as stop:
            main(["validate", str(adapter)])
        assert stop.value.code == 2 and message in capsys.readouterr().err


# several folders


def test_one_that_fails_does_not_stop_the_others(finetuned, adapter, merged, tmp_path, capsys, monkeypatch):
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    both = [finetuned / "final", merged]
    main([str(word) for word in ("validate", *both, "--accelerator", "cpu")])
    printed = capsys.readouterr()
    assert printed.out.count("complete and usable") == 3 and "2 of 2 folders" in printed.out and not printed.err
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in ("validate", "fin*", "nowhere", both[0], "--accelerator", "cpu")])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and "final, nowhere" in err and "2 of 4 folders" in out
    assert re.findall(r"^(folder|failed) +([^:\n]+)", out, re.M) == [
        ("failed", "final"),
        ("folder", "final-merged"),
        ("failed", "nowhere"),
        ("folder", str(both[0])),
    ]


def test_a_pattern_with_one_folder_is_that_folder(merged, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["validate", "*-merged", "--accelerator", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == "The folder is complete and usable."
