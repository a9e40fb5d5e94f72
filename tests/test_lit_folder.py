"""LitGPT's folders give what they mean, and are written so that they mean it again."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.families import read_config, write_config
from litgpt.litgpt_format.folder import notify
from litgpt.methods.model_source import ModelSource
from litgpt.model.config import Config, differences, from_litgpt, to_litgpt
from litgpt.storage.files import read_json
from litgpt.storage.outputs import SINGLE
from tests.conftest import save_llama
from tests.families import ALL, QUICK, save_random
from tests.lit import MODELS, config_fields, lit_weights, save_lit

IDS = torch.randint(2, 199, (2, 40), generator=torch.Generator().manual_seed(1))
ALONE = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "ministral3",
    "qwen2_5_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3",
}  # their text model is written


def ours(folder: Path, base: Path | None = None) -> torch.Tensor:
    return ModelSource.open(folder, base).model(torch.float32, torch.device("cpu"))(IDS)


@torch.no_grad()
def theirs(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(IDS).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * float(expected.abs().max()))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Hugging Face folder of a model of `tests.lit`."""
    made: dict[str, Path] = {}

    def folder(model: str) -> Path:
        if model not in made:
            made[model] = save_random(tmp_path_factory.mktemp("hf") / model, *MODELS[model][:2])
        return made[model]

    return folder


@pytest.fixture
def lit(published, tmp_path) -> Any:
    """Write a model of `tests.lit` in LitGPT's form."""

    def folder(model: str, old: bool = False, under_model: bool = False, **changes: Any) -> Path:
        fields = config_fields(model)
        weights = lit_weights(published(model), fields, old)
        return save_lit(tmp_path / f"lit-{model}", fields | changes, weights, under_model)

    return folder


def command(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    """A command's exit code, and what it writes to stdout and stderr."""
    capsys.readouterr()
    code = 0
    notify.cache_clear()
    try:
        main([str(w) for w in words])
    except SystemExit as e:
        code = int(e.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("old", [False, True], ids=["qkv", "attn.attn"])
@pytest.mark.parametrize("model", MODELS)
def test_logits(model, old, lit, published):
    assert_same(ours(lit(model, old, under_model=old)), theirs(published(model)))


@pytest.mark.parametrize("model", MODELS)
def test_convert_from_litgpt(model, lit, published, tmp_path, capsys):
    """Without a `config.json`, one is written; the weights are the published ones, byte for byte."""
    folder = lit(model)
    assert command(capsys, "convert_from_litgpt", folder, tmp_path / "out")[0] == 0
    assert_same(theirs(tmp_path / "out"), theirs(published(model)))
    wanted = load_file(published(model) / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_convert_from_litgpt_where_there_is_nothing_to_convert(published, tmp_path, capsys):
    """It says so, and writes what the next command of a script expects."""
    folder, out = published("llama"), tmp_path / "out"
    code, _, said = command(capsys, "convert_from_litgpt", folder, out)
    assert code == 0 and "already a Hugging Face folder" in said
    state = torch.load(out / "model.pth", weights_only=True)
    wanted = load_file(folder / "model.safetensors")
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert_same(theirs(out), theirs(folder))
    assert command(capsys, "convert_pretrained_checkpoint", folder, tmp_path / "copy")[0] == 0
    assert_same(theirs(tmp_path / "copy"), theirs(folder))
    assert not (tmp_path / "copy" / "model.pth").exists()


def test_convert_from_litgpt_after_merge_lora(base, whole, tmp_path, capsys):
    """The folder of the adapter stands for the merged model, which LitGPT writes into it."""
    adapter = shutil.copytree(whole("lora") / "final", tmp_path / "final")
    code, _, said = command(capsys, "convert_from_litgpt", adapter, tmp_path / "out")
    assert code == 2 and "litgpt merge_lora" in said and not (tmp_path / "out").exists()
    assert command(capsys, "merge_lora", adapter)[0] == 0
    assert command(capsys, "convert_from_litgpt", adapter, tmp_path / "out")[0] == 0
    assert_same(theirs(tmp_path / "out"), theirs(tmp_path / "final-merged"))
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    assert command(capsys, "convert_from_litgpt", adapter, tmp_path / "other")[0] == 2


def test_convert_from_litgpt_with_model_pth(lit, published, tmp_path, capsys):
    code, said, _ = command(capsys, "convert_from_litgpt", lit("llama"), tmp_path / "out", "--model_pth", "true")
    assert code == 0 and str(tmp_path / "out") in said
    state, wanted = torch.load(tmp_path / "out" / "model.pth"), load_file(published("llama") / "model.safetensors")
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


AS_NEOX = (("falcon", "no groups"), ("starcoder2", "plain"))


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.long, id=" ".join(c)) for c in ALL]
)
def test_there_and_back(case, tmp_path, capsys):
    """Every family that LitGPT has: its form gives the same logits, and the same bytes on the way back."""
    folder = save_random(tmp_path / "model", *case)
    before = {file.name for file in folder.iterdir()}
    code, _, err = command(capsys, "convert_to_litgpt", folder)
    if code:
        assert "LitGPT has no model with" in err
        assert {file.name for file in folder.iterdir()} == before
        return
    (tmp_path / "lit").mkdir()
    for name in ("lit_model.pth", "model_config.yaml"):
        shutil.move(folder / name, tmp_path / "lit")
    assert_same(ours(tmp_path / "lit"), ours(folder))
    assert command(capsys, "convert_from_litgpt", tmp_path / "lit", tmp_path / "out")[0] == 0
    wanted, found = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    if case[0] in ALONE:  # whose vision part LitGPT does not have
        assert_same(ours(tmp_path / "out"), ours(folder))
        return
    family = read_json(tmp_path / "out" / "config.json")["model_type"]
    # in names of a newer transformers, stacked, or a model that two families can say
    if case[0] in ("mixtral", "qwen3_moe", "gpt_neox") or (case in AS_NEOX and family == "gpt_neox"):
        assert_same(ours(tmp_path / "out"), ours(folder))
    else:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("case", ALL, ids=" ".join)
def test_a_config_is_written_as_it_was_read(case):
    from transformers import AutoConfig

    fields = json.loads(AutoConfig.for_model(case[0], **FAMILY_FIELDS(case)).to_json_string(use_diff=False))
    config = read_config(fields)
    written = write_config(config)
    assert written["model_type"] == (case[1] if case == ("mistral3", "mistral") else ALONE.get(case[0], case[0]))
    again = read_config(written)
    assert differences(config, again) == []
    assert (config.tie_embeddings, config.block_size) == (again.tie_embeddings, again.block_size)


def FAMILY_FIELDS(case: tuple[str, str]) -> dict[str, Any]:
    from tests.families import FAMILIES

    return FAMILIES[case[0]][case[1]]


def test_known_models_are_written_for_litgpt():
    for name in ("pythia-14m", "Llama-3.2-1B", "Gemma-2-2b", "Phi-3-mini-4k-instruct", "OLMo-7B-hf", "Qwen3-30B-A3B"):
        config = Config.from_name(name)
        numbers = to_litgpt(config, name)
        assert differences(config, from_litgpt(numbers)) == []
        assert numbers["name"] == name and numbers["padded_vocab_size"] == config.padded_vocab_size


def test_what_litgpt_does_not_have_is_named(tmp_path):
    config = Config.from_name("Gemma-2-2b")
    with pytest.raises(UserError, match=r"norm_unit_offset .*'tiny'"):
        to_litgpt(config, "tiny")
    config.residual_multiplier = 0.5
    with pytest.raises(UserError, match="residual_multiplier"):
        to_litgpt(config, "Gemma-2-2b")


def test_no_config_json_can_say_it(lit, capsys, tmp_path):
    """Gemma's math under a name by which LitGPT does not know it: it runs, and stays what it is."""
    folder = lit("gemma", name="tiny")
    assert ours(folder).isfinite().all()
    code, _, err = command(capsys, "convert_from_litgpt", folder, tmp_path / "out")
    assert code == 2 and "cannot become a Hugging Face folder" in err and "scale_embeddings" in err


def test_config_json_beside_it(lit, published, capsys):
    folder = lit("llama")
    own = json.loads((published("llama") / "config.json").read_text()) | {"eos_token_id": 77}
    (folder / "config.json").write_text(json.dumps(own))
    assert ModelSource.open(folder).checkpoint.fields["eos_token_id"] == 77
    (folder / "config.json").write_text(json.dumps(own | {"rms_norm_eps": 1e-3}))
    notify.cache_clear()
    assert ModelSource.open(folder).checkpoint.config.norm_eps == 0.03
    assert "model_config.yaml (norm_eps)" in capsys.readouterr().err


def test_a_head_that_was_torn_from_its_embedding(lit, published, tmp_path, capsys):
    """LitGPT trains both, where `config.json` still says that they are one."""
    folder = lit("gemma")
    shutil.copyfile(published("gemma") / "config.json", folder / "config.json")
    assert ModelSource.open(folder).checkpoint.config.tie_embeddings
    weights = torch.load(folder / "lit_model.pth")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    torch.save(weights, folder / "lit_model.pth")
    assert_same(ours(folder), 2 * theirs(published("gemma")))
    assert command(capsys, "convert_from_litgpt", folder, tmp_path / "out")[0] == 0
    assert_same(theirs(tmp_path / "out"), 2 * theirs(published("gemma")))


def test_hugging_face_files_win(lit, published, tmp_path, capsys):
    folder = lit("llama")
    for file in published("llama").iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "lit_model.pth").write_bytes(b"something else")
    notify.cache_clear()
    assert_same(ours(folder), theirs(published("llama")))
    ModelSource.open(folder)
    assert capsys.readouterr().err.count("Ignoring lit_model.pth") == 1


class Wants:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_damage(lit, capsys):
    folder = lit("llama")
    file, fields = folder / "lit_model.pth", config_fields("llama")
    whole, weights = file.read_bytes(), torch.load(file)

    def message() -> str:
        code, out, err = command(capsys, "validate", folder)
        assert code == 2 and err.count("\n") == 1 and "Traceback" not in err and "run\n" not in out
        return err

    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:size])
        assert "damaged" in message()
    torch.save({"model": Wants()}, file)
    assert "print" in message()
    file.write_bytes(pickle.dumps({"a": Wants()}))
    message()
    for thing in ([1], {}, {"a": 1}, {"model": {}}, torch.ones(2)):
        torch.save(thing, file)
        assert "does not hold named weights" in message()
    short = {n: t for n, t in weights.items() if n != "lm_head.weight"}
    torch.save(short | {"transformer.h.0.mlp.fc_2.weight": torch.ones(3, 32), "extra": torch.ones(1)}, file)
    found = message()
    assert "lm_head.weight is missing" in found and "extra is unknown" in found
    assert "transformer.h.0.mlp.fc_2.weight (3, 32) instead of (44, 32)" in found
    torch.save({n: t.to(torch.int8) for n, t in weights.items()}, file)
    assert "unsupported type" in message()
    file.write_bytes(whole)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(fields | {"n_query_groups": 3}))
    assert "multiple" in message() and "config.json" not in message()
    (folder / "model_config.yaml").write_text(yaml.safe_dump(fields | {"rope_adjustments": {"beta_fast": 1}}))
    assert "YaRN" in message()
    (folder / "model_config.yaml").unlink()
    assert "has lit_model.pth, but no model_config.yaml" in message()


def test_convert_pretrained_checkpoint(lit, tmp_path, capsys):
    folder = lit("llama")
    weights = torch.load(folder / "lit_model.pth")
    compiled = {f"_orig_mod.{name}": t for name, t in weights.items()}
    torch.save({"model": compiled, "optimizer": {"state": {}}, "step_count": 3}, folder / "lit_model.pth")
    expected = ours(folder)
    assert command(capsys, "convert_pretrained_checkpoint", folder, "--output_dir", tmp_path / "out")[0] == 0
    assert torch.load(tmp_path / "out" / "lit_model.pth", weights_only=True).keys() == weights.keys()
    assert torch.equal(ours(tmp_path / "out"), expected)
    code, _, err = command(capsys, "convert_pretrained_checkpoint", folder, tmp_path / "out")
    assert code == 2 and "is not empty" in err
    code, _, err = command(capsys, "convert_from_litgpt", folder, tmp_path / "a", tmp_path / "b")
    assert code == 2 and "Expected two folders, got 3" in err


def test_options_of_convert_to_litgpt(tmp_path, tokenizer_file, capsys):
    folder = save_llama(tmp_path / "llama", tokenizer_file)
    words = ("--dtype", "bfloat16", "--model_name", "mine", "--debug_mode", "true")
    code, out, _ = command(capsys, "convert_to_litgpt", folder, *words)
    assert code == 0 and "transformer.h.1.mlp.fc_2.weight (44, 32) torch.bfloat16" in out
    weights = torch.load(folder / "lit_model.pth", weights_only=True)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert yaml.safe_load((folder / "model_config.yaml").read_text())["name"] == "mine"
    assert {p.name for p in folder.glob(".*")} == {SINGLE}
    code, _, err = command(capsys, "convert_to_litgpt", folder, "--model_name", "not-Gemma")
    assert code == 2 and "'not-Gemma'" in err


def test_training_from_it(tmp_path, tokenizer_file, rows_file, capsys):
    """An adapter records the folder; a full finetune writes a Hugging Face folder."""
    from safetensors import safe_open

    hf = save_llama(tmp_path / "hf", tokenizer_file)
    folder = tmp_path / "lit"
    assert command(capsys, "convert_to_litgpt", hf)[0] == 0
    folder.mkdir()
    for name in ("lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(hf / name, folder / name)
    for method in ("lora", "full"):
        run = ["--data", "JSON", "--data.json_path", rows_file, "--train.max_steps", 2, "--accelerator", "cpu"]
        run += ["--out_dir", tmp_path / method, "--precision", "32-true", "--optimizer.lr", 0.01]
        run += ["--train.save_interval", 1, "--eval.max_new_tokens", "null"]
        code, _, err = command(capsys, "finetune", method, folder, *run)
        assert code == 0, err
        assert command(capsys, "validate", tmp_path / method / "final")[0] == 0
    assert command(capsys, "merge_lora", tmp_path / "lora" / "final", "--out_dir", tmp_path / "merged")[0] == 0
    for result in ("merged", "full/final"):
        with safe_open(tmp_path / result / "model.safetensors", "pt") as f:
            assert "model.layers.0.self_attn.q_proj.weight" in f.keys()  # noqa: SIM118
        fields = json.loads((tmp_path / result / "config.json").read_text())
        assert fields["architectures"] == ["LlamaForCausalLM"] and fields["eos_token_id"] == 1
        assert_same(theirs(tmp_path / result), ours(tmp_path / result))
    assert_same(ours(tmp_path / "lora" / "final"), ours(tmp_path / "merged"))
