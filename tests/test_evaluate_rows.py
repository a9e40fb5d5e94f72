"""`litgpt evaluate` on rows: the losses are those that the run reported."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.evaluation.compare import bootstrap_interval
from litgpt.evaluation.rows import Scores, differences
from litgpt.train.result import TrainingResult
from tests.conftest import make_rows
from tests.runs import go


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """Run the command, without lm-eval. Returns its results."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # to import it fails

    def run(folder: object, *flags: object) -> dict[str, Any]:
        out = tmp_path / "results"
        capsys.readouterr()
        try:
            main([str(word) for word in ("evaluate", folder, "--device", "cpu", "--out_dir", out, *flags)])
        finally:
            run.out, run.err = capsys.readouterr()  # type: ignore[attr-defined]
        return json.loads((out / "results.json").read_text())

    return run


def loss(results: dict[str, Any]) -> float:
    return results["results"]["rows"]["loss,none"]


def refused(evaluate: Any, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate(*words)
    assert stop.value.code == 2 and evaluate.err.count("\n") == 1
    return evaluate.err


# the rows of the run


@pytest.mark.parametrize("method", ["lora", "lora-embeddings", "adapter", "adapter_v2", "full", "full-packs"])
def test_the_losses_are_those_of_the_run(method, whole, evaluate):
    result = TrainingResult.read(whole(method))
    results = evaluate(whole(method) / "final", "--vs", "base")
    found = results["vs_base"]["rows"]["loss"]
    assert found["base"] == pytest.approx(result.val_losses[0][1], rel=1e-6)
    assert found["adapter"] == loss(results) == pytest.approx(result.val_losses[-1][1], rel=1e-6)
    assert found["n"] == 4 and "4 validation rows of the run" in evaluate.out
    assert found["low"] < found["difference"] < found["high"]
    assert results["results"]["rows"]["perplexity,none"] == pytest.approx(math.exp(loss(results)))


def test_a_pretrained_model(whole, evaluate):
    result = TrainingResult.read(whole("pretrain"))
    assert loss(evaluate(whole("pretrain") / "final")) == pytest.approx(result.val_losses[-1][1], rel=1e-6)
    assert "--vs base" in refused(evaluate, whole("pretrain") / "final", "--vs", "base")


def test_the_precision_is_that_of_the_run(whole, evaluate):
    result = TrainingResult.read(whole("lora-bf16"))
    results = evaluate(whole("lora-bf16") / "final")
    assert loss(results) == pytest.approx(result.val_losses[-1][1], abs=0.05)
    assert results["config"]["model_dtype"] == "torch.bfloat16"
    assert evaluate(whole("lora-bf16") / "final", "--dtype", "float32")["config"]["model_dtype"] == "torch.float32"


def test_4_bits_are_those_of_the_run(whole, evaluate):
    pytest.importorskip("bitsandbytes")
    result = TrainingResult.read(whole("nf4"))
    found = evaluate(whole("nf4") / "final", "--vs", "base")["vs_base"]["rows"]["loss"]
    assert found["base"] == pytest.approx(result.val_losses[0][1], rel=1e-5)
    assert found["adapter"] == pytest.approx(result.val_losses[-1][1], rel=1e-5)


def test_the_options_of_the_run_apply(base, rows_file, tmp_path, evaluate):
    """What decides on the rows and their tokens, and how many are answered."""
    options = ["--data.seed", 7, "--data.val_split_fraction", 0.2, "--data.prompt_style", "flan", "--data.mask_prompt"]
    options += ["true", "--train.max_seq_length", 125, "--eval.exact_match", 3, "--eval.max_new_tokens", 5]
    assert go("lora", base, rows_file, tmp_path / "out", *options, "--train.max_steps", 4) == 0
    result = TrainingResult.read(tmp_path / "out")
    results = evaluate(tmp_path / "out" / "final")
    assert loss(results) == pytest.approx(result.val_losses[-1][1], rel=1e-6)
    assert results["n-samples"]["rows"] == {"original": 8, "effective": 8}
    assert "flan; loss on answers" in evaluate.out and "exact answers  0 of 3 (0.0%)" in evaluate.out


def test_exact_answers_are_those_of_the_run(base, rows_file, tmp_path, evaluate, monkeypatch):
    monkeypatch.setattr("litgpt.train.examples.expected_answer", lambda tokenizer, rows, row: f"{row % 2}")
    monkeypatch.setattr("litgpt.evaluation.rows.expected_answer", lambda tokenizer, rows, row: f"{row % 2}")
    limits = set()
    for place in ("litgpt.train.examples.greedy_answers", "litgpt.evaluation.rows.greedy_answers"):
        monkeypatch.setattr(place, lambda *args: limits.add(args[4]) or ["1"] * len(args[2]))
    flags = ("--eval.exact_match", 3, "--eval.max_new_tokens", 5, "--train.max_steps", 1)
    assert go("lora", base, rows_file, tmp_path / "out", *flags) == 0
    assert evaluate(tmp_path / "out" / "final")["results"]["rows"]["exact_match,none"] == pytest.approx(1 / 3)
    both = evaluate(tmp_path / "out" / "final", "--exact_match", 2, "--vs", "base")["vs_base"]["rows"]["exact_match"]
    assert (both["base"], both["adapter"], both["n"]) == (0.5, 0.5, 2)
    assert limits == {5}


def test_rows_that_are_gone(base, rows_file, tmp_path, evaluate):
    rows, out = Path(shutil.copy(rows_file, tmp_path / "mine.json")), tmp_path / "out"
    assert go("lora", base, rows, out, "--train.max_steps", 1) == 0
    rows.unlink()
    assert all(words in refused(evaluate, out / "final") for words in ("mine.json", "--data"))
    assert go("lora", base, rows_file, out, "--train.max_steps", 1, "--data.val_split_fraction", 0, "--overwrite") == 0
    assert "no validation rows" in refused(evaluate, out / "final")
    (out / "final" / "checksums.json").unlink()  # as in a folder of LitGPT's
    assert "--data" in refused(evaluate, out / "final")
    assert "--data" in refused(evaluate, base) and "--vs base" in refused(evaluate, base, "--vs", "base")


# rows of one's own


def test_all_rows_of_files(whole, base, rows_file, tmp_path, evaluate):
    """Several files, in several forms, with other columns; they are read in the style of the model."""
    rows = make_rows(6, seed=1)
    with open(tmp_path / "a.csv", "w", newline="") as f:
        csv.writer(f).writerows([["q", "a"], *([row["instruction"], row["output"]] for row in rows[:3])])
    chats = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in rows[3:]
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    folder = whole("lora") / "final"
    one = {"path": str(tmp_path / "a.csv"), "columns": {"instruction": "q", "output": "a"}}
    files = ("--data", json.dumps([one, str(tmp_path / "b.jsonl")]))
    results = evaluate(folder, *files, "--data.mask_prompt", "true")
    assert results["n-samples"]["rows"] == {"original": 6, "effective": 6}
    part = evaluate(folder, "--data", json.dumps([one]), "--data.mask_prompt", "true")
    assert part["n-samples"]["rows"]["original"] == 3 and "alpaca; loss on answers" in evaluate.out
    assert evaluate(folder, *files, "--limit", 2)["n-samples"]["rows"] == {"original": 6, "effective": 2}
    assert evaluate(folder, *files, "--limit", 0.5)["n-samples"]["rows"]["effective"] == 3


def test_a_base_on_rows(base, rows_file, evaluate):
    """Held-out rows only if that is asked for; weights do not repeat rows."""
    everything = evaluate(base, rows_file)
    assert everything["n-samples"]["rows"]["original"] == 40 and "40 rows" in evaluate.out
    weighted = evaluate(base, "--data", json.dumps([{"path": str(rows_file), "weight": 3}]))
    assert loss(weighted) == loss(everything)
    held = evaluate(base, rows_file, "--data.val_split_fraction", 0.1)
    assert held["n-samples"]["rows"]["original"] == 4 and "4 validation rows," in evaluate.out


def test_what_does_not_go_together(whole, rows_file, evaluate):
    folder = whole("lora") / "final"
    for flags, word in (
        (["--tasks", "arc_easy", "--data", rows_file], "--data"),
        (["--tasks", "arc_easy", "--exact_match", 3], "--exact_match"),
        (["--num_fewshot", 3], "--num_fewshot"),
        (["--data", rows_file, "--log_samples"], "--log_samples"),
        (["--exact_match", 0], "--exact_match"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ):
        assert word in refused(evaluate, folder, *flags)


def test_a_drop_exits_with_1(whole, evaluate, monkeypatch):
    monkeypatch.setattr("litgpt.evaluation.compare.Difference.drop", 0.03)
    evaluate(whole("lora") / "final", "--vs", "base", "--fail_if_drop", "3%")
    with pytest.raises(SystemExit) as stop:
        evaluate(whole("lora") / "final", "--vs", "base", "--fail_if_drop", "2%")
    assert stop.value.code == 1 and "rows loss" in evaluate.err


# intervals


def test_the_intervals_are_those_of_resampled_rows():
    """Of the loss and the perplexity, which are not means over rows: rows have different numbers of tokens."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 60, (400,), generator=draw)
    easy = 1.0 + 1.0 / counts  # short rows are hard
    before = (easy + 0.5 + 0.3 * torch.rand(400, generator=draw)) * counts
    after = (easy + 0.3 * torch.rand(400, generator=draw)) * counts
    base, own = (Scores(losses.tolist(), counts.tolist()) for losses in (before, after))
    pairs = list(zip(zip(base.losses, base.counts), zip(own.losses, own.counts)))

    def mean(pairs):
        return sum(total for total, _ in pairs) / sum(n for _, n in pairs)

    for found, aggregate in zip(differences(base, own), (mean, lambda pairs: math.exp(mean(pairs)))):
        low, high = bootstrap_interval(pairs, aggregate, 1000, 0)
        width = found.high - found.low
        assert (found.low, found.high) == (pytest.approx(low, abs=0.15 * width), pytest.approx(high, abs=0.15 * width))
        assert found.difference == pytest.approx((found.low + found.high) / 2) and found.clear
    unequal = differences(Scores([1.0], [2]), Scores([2.0], [2]))[0]
    assert (unequal.difference, unequal.low, unequal.high) == (0.5, None, None)
