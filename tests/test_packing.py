"""Packed, padding-free and padded give the same loss; packs are full; every real file trains without an option."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from litgpt.__main__ import main
from litgpt.data.batches import UNTRAINED, PackedRows, best_fit
from litgpt.data.json_file import JSON
from litgpt.methods.model_source import ModelSource
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.loss import LossModel
from tests.conftest import make_rows, some


@torch.no_grad()
def test_packed_padding_free_and_padded_losses(llama, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(make_rows(30)))
    rows = JSON(str(path), val_split_fraction=0, mask_prompt=True).load(Tokenizer(llama), llama, 256).train
    packs = PackedRows(rows, 256)
    assert len(packs) < 28
    gpt = ModelSource.open(llama).model(torch.float32, torch.device("cpu"))
    model = LossModel(gpt)

    free = model(rows.batch(range(30)))
    packed = sum(model(packs.batch([i])) for i in range(len(packs)))
    n = int(rows.lengths.max())
    ids, targets = torch.zeros(30, n, dtype=torch.long), torch.full((30, n), UNTRAINED)
    for i in range(30):
        batch = rows.batch([i])
        length = batch.ids.size(1)
        ids[i, :length], targets[i, :length] = batch.ids[0], batch.targets[0]
    padded = F.cross_entropy(gpt(ids).flatten(0, 1), targets.flatten(), ignore_index=UNTRAINED, reduction="sum")
    n_target_tokens = int((targets != UNTRAINED).sum())
    assert float(free) / n_target_tokens == pytest.approx(float(padded) / n_target_tokens, abs=1e-5)
    assert float(packed) / n_target_tokens == pytest.approx(float(padded) / n_target_tokens, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit(seed):
    lengths = torch.randint(1, 101, (300,), generator=torch.Generator().manual_seed(seed)).tolist()
    packs = best_fit(lengths, 100)
    assert sorted(row for pack in packs for row in pack) == list(range(300))
    sizes = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(sizes) <= 100 and sum(sizes) / (100 * len(sizes)) > 0.9
    assert best_fit(lengths, 100) == packs


def test_packs_of_alpaca_are_full(real_data):
    folder = real_data / "tokenizers" / "minimind"
    data = JSON(str(real_data / "instruct" / "alpaca_13k.json"), prompt_style="alpaca")
    packs = PackedRows(data.load(Tokenizer(folder), folder, 512).train, 512)
    assert float(packs.lengths.float().mean()) / 512 > 0.95


def run(model: Path, out: Path, *options: object) -> list[dict[str, str]]:
    words = ["--out_dir", out, "--precision", "32-true", "--train.max_steps", 5, "--train.global_batch_size", 2,
             "--eval.max_iters", 1, "--eval.initial_validation", "false", "--eval.final_validation", "false",
             "--eval.max_new_tokens", 4, "--accelerator", "cpu"]  # fmt: skip
    main(["finetune", "lora", str(model), *map(str, words), *map(str, options)])
    with open(out / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


REAL = ["alpaca_13k.json", "alpaca_en_demo.json", "dolly_3k.json", "dpo_en_demo.json", "glaive_toolcall_en_demo.json",
        "gsm8k_train.jsonl", "identity.json", "instructions_1100.json", "kto_en_demo.json", "lima.json",
        "sharegpt_dummy.json", "wikisql_train.jsonl"]  # fmt: skip


@pytest.mark.parametrize("file", some(REAL, "lima.json", "glaive_toolcall_en_demo.json", "kto_en_demo.json"))
def test_every_real_file_trains(real_data, tmp_path, file, capsys):
    """Recognised, checked and trained on without a further option."""
    model = real_data / "models" / "stories260k"
    data = ["--data", "JSON", "--data.json_path", str(real_data / "instruct" / file)]
    main(["data", "check", str(model), *data, "--show", "1"])
    checked = capsys.readouterr().out
    assert "No problems found." in checked and "trained" in checked
    assert len(run(model, tmp_path / "out", *data)) == 9  # four steps, and a validation before and after each
    assert "tokens from the cache" in " ".join(capsys.readouterr().out.split())


def test_packed_run(llama, rows_file, tmp_path, capsys):
    metrics = run(llama, tmp_path / "out", "--data", "JSON", "--data.json_path", rows_file, "--train.pack",
                  "--train.max_seq_length", 256)  # fmt: skip
    assert len(metrics) == 9
    assert "of at most 2" in capsys.readouterr().out


def test_text_files(real_data, tmp_path, capsys):
    """Every token of a text is trained, in packs; long documents are cut into rows and nothing of them is lost."""
    model, text = real_data / "models" / "stories260k", real_data / "text" / "tinyshakespeare.txt"
    short = tmp_path / "texts"
    short.mkdir()
    (short / "a.txt").write_text(text.read_text()[:3000])
    (short / "b.txt").write_text(text.read_text()[3000:3100])
    metrics = run(model, tmp_path / "out", "--data", "TextFiles", "--data.train_data_path", short,
                  "--train.max_seq_length", 128)  # fmt: skip
    assert len(metrics) == 9
    from litgpt.data.documents import TextFiles

    tokenizer = Tokenizer(model)
    loaded = TextFiles(str(short), val_split_fraction=0).load(tokenizer, model, 128)
    ids = [i for n in range(len(loaded.train)) for i in loaded.train.row(n)[0].tolist()]
    expected = [i for name in ("a.txt", "b.txt") for i in tokenizer.encode((short / name).read_text(), eos=True)]
    assert ids == expected
    assert loaded.train.trained_share() > 0.98
