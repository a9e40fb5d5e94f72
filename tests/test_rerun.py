"""`run.lock` and `litgpt rerun`: a run is repeated bit by bit, and what is different now is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.train.run_lock import file_hashes, read_lock
from tests.conftest import make_rows, save_llama
from tests.runs import exit_code, lines, same


@pytest.fixture
def done(tmp_path: Path, tokenizer_file: Path) -> Path:
    """The output folder of a run whose base and rows may be changed."""
    base = save_llama(tmp_path / "base", tokenizer_file)
    rows, out = tmp_path / "rows.json", tmp_path / "out"
    rows.write_text(json.dumps(make_rows(30)))
    options = "--precision 32-true --accelerator cpu --train.max_steps 4 --eval.max_new_tokens null --lora_dropout 0.1"
    main([*map(str, ("finetune", "lora", base, rows, "--out_dir", out)), *options.split()])
    return out


def rerun(*words: Any) -> int:
    return exit_code("rerun", *words)


@pytest.mark.parametrize("folder", ["", "final"])
def test_equal(folder, done, capsys):
    assert rerun(done / folder) == 0
    assert f"All {len([line for line in lines(done) if line['loss']])} losses are equal." in capsys.readouterr().out
    same(done, done.with_name("out-again"))
    lock, again = (read_lock(path / "final") for path in (done, done.with_name("out-again")))
    assert lock == again and lock is not None and len(lock["losses"]) == 4


def test_other_rows_or_another_base_are_refused(done, tokenizer_file, capsys):
    rows = done.with_name("rows.json")
    before = rows.read_text()
    rows.write_text(json.dumps([*make_rows(29), {"instruction": "q", "output": "a"}]))
    assert rerun(done) == 2
    err = capsys.readouterr().err
    assert "rows.json" in err and "--force" in err and not done.with_name("out-again").exists()
    assert rerun(done, "--force", "true") == 1  # and the losses differ
    captured = capsys.readouterr()
    assert "rows.json" in captured.err and "the loss was" in captured.out
    rows.write_text(before)
    save_llama(done.with_name("base"), tokenizer_file, seed=1)
    assert rerun(done, "--out_dir", done.with_name("third")) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_other_versions_are_remarks(done, capsys):
    file = done / "final" / "run.lock"
    lock = json.loads(file.read_text())
    lock["versions"] |= {"torch": "1.0", "code": "0"}
    file.write_text(json.dumps(lock))
    assert rerun(done) == 0
    assert "torch was 1.0" in capsys.readouterr().err


def test_without_a_lock(done, tmp_path, capsys):
    (done / "final" / "run.lock").unlink()
    assert rerun(done) == 2 and "run.lock" in capsys.readouterr().err
    assert rerun(tmp_path / "nothing") == 2


def test_hashes_of_large_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("litgpt.train.run_lock.LARGE", 3)
    (tmp_path / "a").write_bytes(b"large")
    first = file_hashes([tmp_path / "a"])
    kept = json.loads((tmp_path / "cache" / "hashes.json").read_text())
    assert list(kept.values()) == [first["a"]]
    (tmp_path / "cache" / "hashes.json").write_text(json.dumps(dict.fromkeys(kept, "known")))
    assert file_hashes([tmp_path / "a"]) == {"a": "known"}
    (tmp_path / "a").write_bytes(b"larger")
    assert file_hashes([tmp_path / "a"])["a"] not in ("known", first["a"])
