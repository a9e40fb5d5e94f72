"""The built-in model learns preferences: its pairs, the recipe, and how a result is evaluated and planned."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt.__main__ import main
from litgpt.data.pico import PicoPairs
from litgpt.data.preferences import PreferenceBatch
from litgpt.train.memory.plan import AssumedRows, without_dry_run
from tests.runs import lines

SMALL = "--data.n_rows 60 --data.n_val 6 --train.max_steps 3 --eval.max_new_tokens 4 --eval.exact_match null".split()


def rows(data: PicoPairs) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    train, val = data.sources()
    assert val is not None
    return [fields for _, fields in train[0].rows()], [fields for _, fields in val[0].rows()]


def test_pairs():
    train, val = rows(PicoPairs())
    assert (len(train), len(val)) == (300, 100) and (train, val) == rows(PicoPairs())
    assert len({row["prompt"] for row in [*train, *val]}) == 400
    for row in [*train, *val]:
        assert len(row["chosen"].split()) < len(row["rejected"].split())
    assert all(row["chosen"].rstrip(".").split()[-1] in row["prompt"] for row in val)  # copied, not remembered
    assert rows(PicoPairs(seed=1))[1] != val


@pytest.mark.long
def test_the_recipe(tmp_path):
    """On held-out pairs: the accuracy of the rewards, and the answers before and after."""
    main(["finetune", "dpo", "--config", "pico/dpo", "--out_dir", str(tmp_path / "out")])
    last = lines(tmp_path / "out")[-1]
    assert float(last["val_rewards/accuracies"]) > 0.95
    assert float(last["val_logps/chosen"]) > -1 and float(last["val_logps/rejected"]) < -20
    assert short_answers("pico", tmp_path) == 0
    assert short_answers(str(tmp_path / "out" / "final"), tmp_path) >= 95


def short_answers(model: str, folder: Path) -> int:
    """How many of the 100 held-out prompts get the short answer."""
    _, val = rows(PicoPairs())
    asked, answered = folder / "asked.jsonl", folder / f"{model.replace('/', '-')}.jsonl"
    asked.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in val))
    files = ["--prompts", str(asked), "--out", str(answered), "--precision", "32-true"]
    main(["generate", model, *files, "--temperature", "0", "--max_new_tokens", "20"])
    given = [json.loads(line)["answer"].strip() for line in answered.read_text().splitlines()]
    return sum(text == row["chosen"] for text, row in zip(given, val, strict=True))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a few steps."""
    folder = tmp_path_factory.mktemp("dpo")
    main(["finetune", "dpo", "--config", "pico/dpo", *SMALL, "--out_dir", str(folder)])
    return folder


def test_the_reference_is_named(result, capsys, tmp_path):
    main(["finetune", "dpo", str(result / "final"), *SMALL, "--config", "pico/dpo", "--out_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "sigmoid, beta 0.1, plus 1 x the loss of the chosen answers" in printed
    assert re.search(r"reference +the model before the first step", printed)


def test_evaluate(result, capsys):
    """The loss is that of the chosen answers, and the accuracy that of the last validation."""
    final = result / "final"
    main(["evaluate", str(final), "--vs", "base", "--precision", "32-true"])
    printed, last = capsys.readouterr().out, lines(result)[-1]
    assert "6 validation pairs of the run" in printed and "loss on chosen answers" in printed
    found = json.loads((final / "evaluate" / "results.json").read_text())
    scores = found["results"]["rows"]
    assert scores["reward_accuracy,none"] == pytest.approx(float(last["val_rewards/accuracies"]))
    assert "reward accuracy, over the base: " in printed
    n_tokens = int(re.search(r"of the run, (\d+) target tokens", printed)[1])  # type: ignore[index]
    assert scores["loss,none"] * n_tokens == pytest.approx(-6 * float(last["val_logps/chosen"]), rel=1e-4)
    assert "chosen_wins" in json.dumps(found["vs_base"]) and "chosen wins" in printed


def test_evaluate_on_other_rows(result, capsys, tmp_path):
    """Rows that are no pairs are scored as ever; a result of other training takes the chosen answers of pairs."""
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"instruction": "What colour is the fox?", "output": "red."}]))
    main(["evaluate", str(result / "final"), "--data", str(answers), "--overwrite", "true"])
    printed = capsys.readouterr().out
    assert "1 row," in printed and "chosen" not in printed


def test_assumed_rows():
    """A pair of assumed rows is two of them."""
    for unit, n_sequences, n_rejected in (("pair", 2, 3), ("label", 1, 0)):
        rows = AssumedRows(50, unit)  # type: ignore[arg-type]
        batch = rows.batch([0, 1, 2])
        assert isinstance(batch, PreferenceBatch) and batch.n_rejected == n_rejected
        assert batch.seqlens == [50] * n_sequences * 3 and int(rows.lengths[0]) == 50 * n_sequences


def test_the_planned_command_runs():
    for flags in ("--dry_run true", "--dry_run=true", "--dry-run true", "--dry_run"):
        words = f"litgpt finetune dpo {flags} pico --data true".split()
        assert without_dry_run(words) == "litgpt finetune dpo pico --data true".split()


def test_verify_resume(monkeypatch, capsys):
    called: list[list[str]] = []
    keep: Callable[..., None] = lambda words, *more: called.append(words)  # noqa: E731
    monkeypatch.setattr("litgpt.commands.verify_resume.run", keep)
    monkeypatch.setattr("litgpt.commands.verify_resume.first_difference", lambda a, b: None)
    for method in ("dpo", "kto", "adapter_v2"):
        main(["verify-resume", method, "pico", "--steps", "1"])
    assert [words[:2] for words in called[::3]] == [["dpo", "pico"], ["kto", "pico"], ["adapter_v2", "pico"]]
