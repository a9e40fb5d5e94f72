"""What a user can get wrong ends in one line that names cause and remedy, exit code 2, and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.__main__ import main
from litgpt.data.tokens import Counts, TokenChunk, TokenWriter, cached_tokens
from tests.conftest import make_rows, save_llama


@pytest.fixture
def fails(capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail, and return its one line."""

    def run(*argv: object) -> str:
        before = sorted(p for p in tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert err.startswith("litgpt: error: ") and err.count("\n") == 1, err
        assert sorted(p for p in tmp_path.rglob("*")) == before, "something was written"
        return err

    return run


@pytest.fixture
def run(llama: Path, rows_file: Path, tmp_path: Path) -> list[object]:
    """A finetune that would work."""
    return ["finetune", "lora", llama, "--data", "JSON", "--data.json_path", rows_file, "--out_dir", tmp_path / "out"]


def test_no_such_folder(fails, run, llama):
    run[2] = str(llama)[:-1] + "o"
    error = fails(*run)
    assert "No model folder" in error and f"Did you mean '{llama}'" in error


def test_folder_without_config(fails, run, llama, tmp_path):
    run[2] = shutil.copytree(llama, tmp_path / "model")
    (run[2] / "config.json").unlink()
    assert f"{run[2]} is not a Hugging Face model folder" in fails(*run)
    (run[2] / "final").mkdir()
    assert f"Did you mean '{run[2] / 'final'}'?" in fails(*run)


def test_truncated_safetensors(fails, run, llama, tmp_path):
    run[2] = shutil.copytree(llama, tmp_path / "model")
    file = run[2] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    error = fails(*run)
    assert str(file) in error and "truncated" in error and "Download it again" in error


def test_missing_shard(fails, run, tokenizer_file, tmp_path):
    run[2] = save_llama(tmp_path / "model", tokenizer_file, shards=True)
    shard = sorted(run[2].glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"has no {shard.name}" in fails(*run)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
def test_index(fails, run, llama, tmp_path, text):
    run[2] = shutil.copytree(llama, tmp_path / "model")
    (run[2] / "model.safetensors").unlink()
    (run[2] / "model.safetensors.index.json").write_text(text)
    assert str(run[2] / "model.safetensors.index.json") in fails(*run)


def test_weights_that_are_no_numbers_of_ours(fails, run, llama, tmp_path):
    run[2] = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(llama / "model.safetensors")
    norm = {"model.norm.weight": weights["model.norm.weight"].to(torch.int8)}
    save_file(weights | norm, run[2] / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight I8" in fails(*run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama', which is not supported. Did you mean 'llama'?"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_size": "48"}, "hidden_size '48'"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
        ({"rope_parameters": [1]}, "rope_parameters [1]"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "without usable factor"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_size": None}, "lacks the field 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters of type 'spiral'"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "unknown: model.layers.1."),
        ({"tie_word_embeddings": True}, "lm_head.weight that differs from model.embed_tokens.weight"),
        ({"intermediate_size": 45}, "mlp.gate_proj.weight (44, 32) instead of (45, 32)"),
    ],
)
def test_config_json(fails, run, llama, tmp_path, changes, message):
    run[2] = shutil.copytree(llama, tmp_path / "model")
    fields = json.loads((run[2] / "config.json").read_text())
    (run[2] / "config.json").write_text(json.dumps(fields | changes))
    assert message in fails(*run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.json", '[\n {"instruction": }\n]', "line 2, column 18"),
        ("a.json", '["one", "two"]', "row 1 (index 0), is text, not an object with instruction and output"),
        ("a.json", '{"a": 1}', "Expected a list of rows"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction"\n', "line 2, column 15"),
        ("a.jsonl", '{"instruction": "a", "output": 3}\n', "line 1, has output '3', which is a number"),
        ("a.txt", "hello", "unknown extension"),
    ],
)
def test_rows(fails, run, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    run[6] = tmp_path / name
    error = fails(*run)
    assert message in error and name in error


def test_row_without_output(fails, run, tmp_path):
    rows = make_rows(30)
    del rows[16]["output"]
    run[6] = tmp_path / "a.json"
    run[6].write_text(json.dumps(rows))
    error = fails(*run)
    assert "row 17" in error and "is missing output. Found: instruction, input" in error


def test_no_rows_file(fails, run, rows_file):
    run[6] = rows_file.with_name("row.json")
    assert f"Did you mean '{rows_file}'" in fails(*run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.micro_batch_size", 0], "--train.micro_batch_size 0 must be above 0"),
        (
            ["--train.micro_batch_size", 3],
            "global_batch_size 16 is not a multiple of --train.micro_batch_size 3; use 15 or 18",
        ),
        (["--precision", "bf17"], "--precision bf17: expected 32-true, bf16-true"),
        (["--data.val_split_fraction", 1.5], "--data.val_split_fraction 1.5"),
        (["--trian.max_steps", 3], "Unknown option --trian.max_steps. Did you mean '--train.max_steps'?"),
        (["--train.max_steps", "many"], "--train.max_steps many: expected an integer"),
        (["--data.json_paht", "x"], "Unknown option --data.json_paht. Did you mean '--data.json_path'?"),
        (["--train.min_lr", 0.1], "--train.min_lr 0.1 is above the learning rate 0.02"),
        (["--train.lr_warmup_fraction", 2], "--train.lr_warmup_fraction 2"),
        (["--devices", 0], "--devices 0 must be above 0"),
        (["--num_nodes", -1], "--num_nodes -1 must be above 0"),
        (["--seed", 10**30], "--seed"),
        (["--optimizer.lr", -1], "--optimizer: Invalid learning rate"),
        (["--lora_r", 0], "--lora_r 0 must be above 0"),
        (["--lora_query", "false", "--lora_value", "false"], "--lora_query"),
        (["--lora_dropout", 1.5], "--lora_dropout 1.5"),
        (["--lora_alpha", 0], "--lora_alpha 0 must be above 0"),
        (["--train.max_step", 3], "Unknown option --train.max_step. Did you mean '--train.max_steps'?"),
        (["-c", 3], "Unknown option -c."),
        (["--data.seed", "x"], "error: --data.seed x: expected an integer.\n"),
        (["--data.columns", "[1]"], "error: --data.columns [1]: expected a mapping"),
        (["--optimizer.lr", "high"], "error: --optimizer.lr high: expected a number.\n"),
        (
            ["--optimizer", "SGD", "--optimizer.momentun", 1],
            "--optimizer.momentun. Did you mean '--optimizer.momentum'",
        ),
        (["--accelerator", "tpu"], "--accelerator tpu: expected auto, cpu, cuda or mps"),
        (["--devices", "two"], "--devices two: expected an integer or auto.\n"),
        (["--train.tie_embeddings", "true"], "--train.tie_embeddings"),
        (["--eval.interval", 0], "--eval.interval 0 must be above 0"),
        (["--eval.evaluate_example", 99], "--eval.evaluate_example 99"),
        (["--data.prompt_style", "alpca"], "Did you mean 'alpaca'?"),
        (["--data.prompt_style", "chat"], "has no chat template"),
        (["--train.max_steps"], "--train.max_steps needs a value"),
        (["--config", "llama-3.2-1B/lorra"], "Did you mean 'llama-3.2-1B/lora'?"),
        (["another"], "Expected one model, got 2"),
        ([__file__], "--data.json_path"),
        (["--data", "Alpaca", "my.json"], "--data names files"),
        (["my.json"], "--data.json_path"),
        (["--data", "JSON", "--data", "my.json"], "--data.json_path"),
        (["--rate", 1], "Unknown option --rate."),
        (["--micro_batch", 1], "Unknown option --micro_batch. Did you mean '--train.micro_batch_size'?"),
        (["--accelerator", "tpu"], "--accelerator tpu: expected auto, cpu, cuda or mps.\n"),
        (["--data", __file__], "--data.json_path"),
        (["--data", "my.json"], "--data.json_path"),
        (["--data", "mine"], "--data mine: no such data set. Choose from FLAN"),
        (["--data", "torch.nn.Linear"], "--data torch.nn.Linear: no such data set. Choose from FLAN"),
        (["--optimizer", "AdamWW"], "AdamWW"),
    ],
)
def test_flags(fails, run, flags, message):
    assert message in fails(*run, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"train:\n  max_stpes: 3\n", "known option --train.max_stpes. Did you mean '--train.max_steps'?"),
        (b"trian:\n  max_steps: 3\n", "known option --trian. Did you mean '--train'?"),
        (b"trian: {}\n", "known option --trian"),
        (b"train: 3\n", "train is 3. Expected a mapping"),
        (b"eval: [1]\n", "eval is [1]. Expected a mapping"),
        (b"1: 2\n", "known option --1."),
        (b"seed: 2024-01-01\n", "error: --seed 2024-01-01: expected an integer."),
        (b"data: 3\n", "data is 3. Expected a mapping"),
        (b"a: [\n", "is not YAML"),
        (b"just words\n", "has no options"),
        (b"seed: \xff\n", "is not UTF-8 text (byte 6)"),
    ],
)
def test_config_file(fails, run, tmp_path, text, message):
    (tmp_path / "c.yaml").write_bytes(text)
    assert message in fails(*run, "--config", tmp_path / "c.yaml")


def test_data_class(fails, run):
    run[4] = "JSNO"
    assert "Did you mean 'JSON'?" in fails(*run)


def test_no_data(fails, llama, tmp_path):
    start = ["--initial_checkpoint_dir", llama, "--out_dir", tmp_path / "out"]
    assert "--data TextFiles --data.train_data_path FOLDER" in fails("pretrain", *start)


def test_no_model(fails):
    assert "Missing: the model folder" in fails("finetune", "lora")


def test_out_dir_is_a_file(fails, run, tmp_path):
    (tmp_path / "out").write_text("")
    assert f"--out_dir {tmp_path / 'out'}" in fails(*run)


@pytest.mark.parametrize("command", ["finetun", "finetune_lroa", "generat"])
def test_unknown_command(fails, command):
    assert "Did you mean" in fails(command)


def test_what_a_beginner_types(fails):
    assert "pico, which is built in" in fails("generate")
    assert "Did you mean 'pico'?" in fails("generate", "pcio")
    assert "use --prompt '...'" in fails("generate", "pico", "Who are you?")
    assert "error: Missing: --data.json_path.\n" in fails("finetune", "lora", "pico", "--data", "JSON")
    assert "nothing to download" in fails("download", "pico")
    assert "Unknown command '-v'." in fails("-v")


def test_generate_and_validate(fails, llama, tmp_path):
    assert "No model folder" in fails("generate", tmp_path / "nowhere")
    assert "is not an adapter folder" in fails("merge_lora", llama)
    assert "--temperature -1.0" in fails("generate", llama, "--temperature", "-1.0")
    assert "--base" in fails("generate", llama, "--base", llama)


@pytest.mark.parametrize("typed, meant", [("finetune lroa", "finetune lora"), ("tokenizer trian", "tokenizer train")])
def test_a_misspelt_command_of_two_words(fails, typed, meant):
    assert f"Unknown command '{typed}'. Did you mean '{meant}'?" in fails(*typed.split(), "x")


def test_no_validation_file(fails, run, rows_file):
    error = fails(*run, "--data.val_path", rows_file.with_name("row.json"))
    assert "(--data.val_path)" in error and f"Did you mean '{rows_file}'?" in error


# errors of the code


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError])
@pytest.mark.parametrize(
    "place",
    [
        "litgpt.train.run.finished",  # beside the class of an optimizer, which refuses its options
        "litgpt.data.tokens.TokenizedRows.__init__",  # while tokens of an earlier run are opened
        "litgpt.checkpoint.download.Repository.open",  # among the errors of a network
    ],
)
def test_errors_of_the_code_stay_what_they_are(place, error, run, llama, tmp_path, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise error("this is a bug")

    if "tokens" in place:
        main([*map(str, run), "--train.max_steps", "1", "--eval.max_new_tokens", "null"])
        run[-1] = tmp_path / "again"
    monkeypatch.setattr("litgpt.checkpoint.download.offline", lambda: False)
    monkeypatch.setattr(place, fail)
    command = ["download", "org/name"] if "download" in place else run
    with pytest.raises(error, match="this is a bug"):
        main([*map(str, command)])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, counts: tensors.pop("loss_mask"),
        lambda tensors, counts: tensors.update(ids=tensors["ids"].long()),
        lambda tensors, counts: counts.clear(),
        lambda tensors, counts: counts.update(counts="[1]"),
        lambda tensors, counts: counts.update(counts='[{"rows": 1}]'),
        lambda tensors, counts: counts.update(counts='{"rows": 1}'),
        lambda tensors, counts: counts.update(counts="{"),
    ],
)
def test_tokens_of_another_make_are_made_again(change, tmp_path):
    writer, chunk = TokenWriter(tmp_path / "tokens.safetensors"), TokenChunk()
    chunk.add([1, 2, 3], b"\0\1\1")
    writer.counts.append(Counts())
    writer.add(chunk)
    writer.close()
    assert cached_tokens(tmp_path / "tokens.safetensors") is not None
    tensors = {k: v.clone() for k, v in load_file(tmp_path / "tokens.safetensors").items()}
    counts = {"counts": json.dumps([vars(Counts())])}
    change(tensors, counts)
    save_file(tensors, tmp_path / "other.safetensors", metadata=counts)
    assert cached_tokens(tmp_path / "other.safetensors") is None
