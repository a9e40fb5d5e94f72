"""Pretraining from a random start and from a model, and training a tokenizer."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.__main__ import main
from litgpt.checkpoint import folder as checkpoint_module
from litgpt.methods.model_source import ModelSource
from tests.conftest import WORDS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("text")
    for i in range(3):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS[:5], k=900)))
    return folder


def pretrain(out: Path, text: Path, *words: object) -> list[dict[str, str]]:
    options = ["--data", "TextFiles", "--data.train_data_path", text, "--train.max_seq_length", 64,
               "--train.global_batch_size", 4, "--train.lr_warmup_steps", 3, "--train.max_steps", 20,
               "--train.epochs", 5, "--eval.interval", 10, "--optimizer.lr", 0.01, "--train.min_lr", 0,
               "--accelerator", "cpu", "--out_dir", out]  # fmt: skip
    main(["pretrain", *map(str, options), *map(str, words)])
    with open(out / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def val_losses(metrics: list[dict[str, str]]) -> list[float]:
    return [float(m["val_loss"]) for m in metrics if m["val_loss"]]


@pytest.mark.parametrize("tied", [True, False])
def test_from_scratch(llama, text, tmp_path, tied):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied, "attention_bias": True}))
    metrics = pretrain(tmp_path / "out", text, "--model_config", config, "--tokenizer_dir", llama)
    losses = val_losses(metrics)
    assert losses == sorted(losses, reverse=True) and losses[0] > 5 and losses[-1] < 3.5
    final = tmp_path / "out" / "final"
    fields = json.loads((final / "config.json").read_text())
    assert fields == CONFIG | {"tie_word_embeddings": tied, "attention_bias": True, "dtype": "float32",
                               "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(final).eval()
    ours = ModelSource.open(final).model(torch.float32, torch.device("cpu"))
    ids = torch.randint(2, 300, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    main(["validate", str(final)])
    assert not (final / "prompt_style.yaml").exists()


def test_the_seed_draws_the_weights(llama, text, tmp_path):
    config = ["--model_config", json.dumps(CONFIG), "--tokenizer_dir", llama, "--train.max_steps", 1]
    first, again, other = (
        val_losses(pretrain(tmp_path / name, text, *config, "--seed", seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_continued(llama, text, tmp_path):
    losses = val_losses(pretrain(tmp_path / "out", text, "--initial_checkpoint_dir", llama))
    assert losses[-1] < losses[0] - 1
    before, after = (
        ModelSource.open(f).model(torch.float32, torch.device("cpu")) for f in (llama, tmp_path / "out" / "final")
    )
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters())]
    assert all(moved)


def test_continued_as_in_litgpts_readme(llama, text, tmp_path, monkeypatch):
    """With the name of the model, its tokenizer and its weights, which are the same model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "checkpoints" / "me" / "tiny")
    other = shutil.copytree(llama, tmp_path / "other")
    words = ["me/tiny", "--initial_checkpoint_dir", "me/tiny", "--train.max_steps", 1]
    named = pretrain(tmp_path / "out", text, *words, "--tokenizer_dir", "me/tiny")
    fields = {"--model_config": other / "config.json", "--tokenizer_dir": other}
    described = pretrain(tmp_path / "out2", text, *words[1:], *(w for pair in fields.items() for w in pair))
    alone = pretrain(tmp_path / "out3", text, *words[1:])
    assert val_losses(named) == val_losses(described) == val_losses(alone)


def test_the_fields_of_litgpts_config(llama, text, tmp_path):
    fields = {"name": "tiny", "n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 128, "padded_vocab_size": 320,
              "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 44, "bias": False,
              "parallel_residual": False, "rotary_percentage": 1.0}  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model_config": fields}))
    pretrain(tmp_path / "out", text, "--config", file, "--tokenizer_dir", llama, "--train.max_steps", 1)
    written = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert (written["num_hidden_layers"], written["hidden_size"], written["vocab_size"]) == (2, 32, 320)


def test_shards_that_we_write(llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "SHARD", 20_000)
    pretrain(tmp_path / "out", text, "--initial_checkpoint_dir", llama, "--train.max_steps", 1)
    final = tmp_path / "out" / "final"
    assert len(list(final.glob("model-*-of-*.safetensors"))) > 3
    ids = torch.randint(2, 300, (1, 60))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(final).eval()(ids).logits
        ours = ModelSource.open(final).model(torch.float32, torch.device("cpu"))(ids)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model_config"),
        (["--model_config", json.dumps(CONFIG)], "--tokenizer_dir"),
        (["--model_config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model_config", json.dumps(CONFIG | {"vocab_size": 100}), "--tokenizer_dir", "LLAMA"], "vocab_size 100"),
        (["--model_config", json.dumps({"model_type": "llama"}), "--tokenizer_dir", "LLAMA"], "lacks the field"),
        (
            ["--initial_checkpoint_dir", "LLAMA", "--model_config", json.dumps(CONFIG | {"hidden_size": 64})],
            "Omit --model_config",
        ),
        (["--initial_checkpoint_dir", "LLAMA", "--model_name", "pythia-14m"], "Omit --model_name"),
        (["--initial_checkpoint_dir", "LLAMA", "--tokenizer_dir", "pico"], "--tokenizer_dir pico"),
    ],
)
def test_errors(llama, text, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "out", text, *(str(llama) if w == "LLAMA" else w for w in words))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_list_of_models(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["pretrain", "list"])
    names = capsys.readouterr().out.splitlines()
    assert "pythia-14m" in names and "tiny-llama-1.1b" in names and names == sorted(names, key=str.lower)


def test_an_adapter_is_merged_before_it_is_a_start(llama, rows_file, text, tmp_path, capsys):
    words = ["--data", "JSON", "--data.json_path", str(rows_file), "--train.max_steps", "1", "--out_dir"]
    main(["finetune", "lora", str(llama), *words, str(tmp_path / "a")])
    files = ["--data", "TextFiles", "--data.train_data_path", str(text), "--train.max_steps", "1", "--out_dir"]
    main(["pretrain", "--initial_checkpoint_dir", str(tmp_path / "a" / "final"), *files, str(tmp_path / "b")])
    assert (tmp_path / "b/final/model.safetensors").is_file() and not (
        tmp_path / "b/final/adapter_config.json"
    ).exists()


def test_tokenizer_train(text, tmp_path, capsys):
    out = tmp_path / "tokenizer"
    main(["tokenizer", "train", str(text), "--vocab_size", "290", "--out_dir", str(out)])
    assert "tokens from 3 files" in capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained(out)
    from litgpt.text.tokenizer import Tokenizer

    ours = Tokenizer(out)
    for sample in ("the quick brown fox", "Ünïcödé 東京 😀", "", " two  blanks\n"):
        assert ours.encode(sample) == theirs(sample).input_ids
        assert ours.decode(ours.encode(sample)) == sample
    assert ours.bos_id == 0 and ours.eos_id == 1 and len(ours.encode("the quick")) <= 5
    for words in (["--vocab_size", "100"], ["--out_dir", str(out)]):
        with pytest.raises(SystemExit):
            main(["tokenizer", "train", str(text), *words])
    with pytest.raises(SystemExit):
        main(["tokenizer", "train", str(tmp_path / "nothing")])


@pytest.mark.long
def test_continued_pretraining_of_a_real_model(real_data, tmp_path):
    """stories260k on Shakespeare: from about 4.8 to under 2.4 nats a token in 300 steps of 4,096 tokens."""
    text = real_data / "text" / "tinyshakespeare.txt"
    losses = val_losses(
        pretrain(tmp_path / "out", text, "--initial_checkpoint_dir", real_data / "models" / "stories260k",
                 "--train.max_seq_length", 512, "--train.global_batch_size", 8, "--train.micro_batch_size", 8,
                 "--train.lr_warmup_steps", 20, "--train.max_steps", 300, "--eval.interval", 100,
                 "--optimizer.lr", 0.003)
    )  # fmt: skip
    assert 4.5 < losses[0] < 4.9 and losses[-1] < 2.4 and losses == sorted(losses, reverse=True)


@pytest.mark.long
def test_from_scratch_on_real_text(real_data, tmp_path):
    """A new tokenizer and a new model of 0.9 million parameters on Shakespeare, as in tutorials/pretrain.md."""
    text, tokenizer = real_data / "text" / "tinyshakespeare.txt", tmp_path / "tokenizer"
    main(["tokenizer", "train", str(text), "--vocab_size", "1024", "--out_dir", str(tokenizer)])
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_key_value_heads": 4}
    losses = val_losses(
        pretrain(tmp_path / "out", text, "--tokenizer_dir", tokenizer, "--train.max_seq_length", 256,
                 "--model_config", json.dumps(CONFIG | sizes | {"max_position_embeddings": 256}),
                 "--train.global_batch_size", 16, "--train.micro_batch_size", 16, "--train.lr_warmup_steps", 30,
                 "--train.min_lr", 1e-4, "--train.max_steps", 300, "--eval.interval", 50, "--optimizer.lr", 0.003)
    )  # fmt: skip
    assert len(losses) == 7 and losses == sorted(losses, reverse=True) and losses[-1] < 4
