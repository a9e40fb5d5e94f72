"""The model card of a result, and the license and the name of the base that it passes on."""

import contextlib
import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt.__main__ import main
from litgpt.checkpoint.model_card import LEGAL_BYTES, RANKS, Facts, front_matter, vllm_command, write_card
from litgpt.data.sources import RowSource
from litgpt.methods.model_source import ModelSource
from litgpt.storage.outputs import SUMS, listed
from litgpt.train.card import describe_source, hub_id, table
from litgpt.train.resume.state import damage
from tests.runs import words

CARD = "README.md"
BASE_CARD = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: a/b\n---\n# The base\n"


@pytest.fixture
def hub_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base that was downloaded from the hub, with a card and a license; commands run beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints" / "some" / "base"
    shutil.copytree(base, folder)
    (folder / CARD).write_text(BASE_CARD)
    (folder / "LICENSE").write_text("You may.")
    (folder / "NOTICE.txt").write_text("x" * (LEGAL_BYTES + 1))
    return folder


def run(method: str, base: Path, rows: Path, out: Path, *flags: object) -> Path:
    main(words(method, base, rows, out, *flags))
    return out / "final"


def fields(folder: Path) -> dict[str, Any]:
    """The YAML of a card, as the hub reads it."""
    text = (folder / CARD).read_text(encoding="utf-8")
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("---\n")[1])
    assert found == front_matter(text)
    return found


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the program in a card prints."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, {})
    return out.getvalue()


def test_an_adapter(hub_base, rows_file, tmp_path, monkeypatch):
    folder = run("lora", Path("some/base"), rows_file, tmp_path / "out", "--train.save_best", "true")
    text, found = (folder / CARD).read_text(encoding="utf-8"), fields(folder)
    assert (found["base_model"], found["base_model_relation"], found["library_name"]) == (
        "some/base",
        "adapter",
        "peft",
    )
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "own", "LICENSE")
    assert found["pipeline_tag"] == "text-generation" and "lora" in found["tags"] and "datasets" not in found
    assert (folder / "LICENSE").read_text() == "You may." and not (folder / "NOTICE.txt").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    with open(tmp_path / "out" / "metrics.csv") as f:
        losses = [row["val_loss"] for row in csv.DictReader(f) if row["val_loss"]]
    before, after = (f"{float(loss):.4f}" for loss in (losses[0], losses[-1]))
    assert f"| {before} before, {after} after |" in text and f"`{rows_file.name}`: " in text
    assert "rank 8" in text and "| alpaca |" in text
    assert str(tmp_path) not in text and str(rows_file.parent) not in text, "no path of this machine"
    assert len(text.splitlines()) < 90 and "--max-lora-rank 8" in text
    assert folder / CARD in listed(folder / SUMS) and folder / "LICENSE" in listed(folder / SUMS)
    best = tmp_path / "out" / "best"
    assert (best / CARD).is_file() and damage(best) is None
    assert not list((tmp_path / "out").glob(f"step-*/{CARD}"))


def test_the_base_is_found_where_it_was(hub_base, rows_file, tmp_path, monkeypatch):
    """By its hub ID in `checkpoints`, or else where the run read it."""
    folder = run("lora", hub_base, rows_file, tmp_path / "out")
    assert ModelSource.open(folder).checkpoint.folder.resolve() == hub_base
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ModelSource.open(folder).checkpoint.folder.resolve() == hub_base
    shutil.copytree(hub_base, tmp_path / "elsewhere/checkpoints/some/base")
    assert ModelSource.open(folder).checkpoint.folder.resolve() == tmp_path / "elsewhere/checkpoints/some/base"


def test_a_path_as_base(base, rows_file, tmp_path, monkeypatch, capsys):
    folder = run("lora", base, rows_file, tmp_path / "out")
    last = " ".join(capsys.readouterr().out.split()).partition("Next:")[2]
    assert f"path on this machine, {base}. Elsewhere" in last
    assert "base_model" not in fields(folder) and "--base" in (folder / CARD).read_text()
    assert answer(folder, monkeypatch)


def test_full(hub_base, rows_file, tmp_path, monkeypatch, capsys):
    folder = run("full", hub_base, rows_file, tmp_path / "out")
    assert "path on this machine" not in capsys.readouterr().out
    found, text = fields(folder), (folder / CARD).read_text()
    assert (found["base_model_relation"], found["library_name"]) == ("finetune", "transformers")
    assert answer(folder, monkeypatch)
    monkeypatch.chdir(tmp_path)
    main(["export", str(folder), "--to", "hf", "--type", "bf16", "--out", "copy"])
    training = text.partition("## Training")[2].partition("## Use")[0]
    assert fields(Path("copy")) == found and training in (tmp_path / "copy" / CARD).read_text()
    assert (tmp_path / "copy" / "LICENSE").is_file()
    main(["export", str(hub_base), "--to", "hf", "--type", "bf16", "--out", "of-base"])
    card = (tmp_path / "of-base" / CARD).read_text()
    assert fields(Path("of-base"))["base_model_relation"] == "quantized" and "# The base" not in card
    assert "## Training" not in card and "finetuned" not in card


def test_merged(hub_base, rows_file, tmp_path, monkeypatch):
    folder = run("lora", hub_base, rows_file, tmp_path / "out")
    main(["merge_lora", str(folder)])
    merged = folder.with_name("final-merged")
    found = fields(merged)
    assert (found["base_model"], found["base_model_relation"], found["library_name"]) == (
        "some/base",
        "finetune",
        "transformers",
    )
    assert "rank 8" in (merged / CARD).read_text() and (merged / "LICENSE").is_file()
    assert answer(merged, monkeypatch)


def test_pretrained(base, rows_file, tmp_path, monkeypatch):
    folder = run("pretrain", base, rows_file, tmp_path / "out")
    assert "random weights" in (folder / CARD).read_text() and "base_model" not in fields(folder)
    assert answer(folder, monkeypatch)


def test_only_litgpt_reads_a_llama_adapter(base, rows_file, tmp_path):
    folder = run("adapter", base, rows_file, tmp_path / "out")
    text = (folder / CARD).read_text()
    assert "Only litgpt" in text and "python" not in text and fields(folder)["library_name"] == "litgpt"


@pytest.mark.parametrize("how", ["overwrite", "extend", "merge", "hf"])
def test_a_card_that_people_wrote_stays(how, base, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = {
        "overwrite": words("lora", base, rows_file, Path("out"), "--overwrite", "true", "--train.max_steps", 2),
        "extend": [*words("lora", base, rows_file, Path("out"), "--resume", "true"), "--train.max_steps", "14"],
        "merge": ["merge_lora", "out/final", "--overwrite"],
        "hf": ["export", "out/final", "--to", "hf", "--out", "out-hf", "--overwrite"],
    }
    places = {"merge": Path("out/final-merged"), "hf": Path("out-hf")}
    run("lora", base, rows_file, Path("out"))
    place = places.get(how, Path("out/final"))
    if how in places:
        main(commands[how])
    (place / CARD).write_text("# Mine\n")
    for steps in (14, 16):  # the second time, it must not be taken for ours
        if how == "extend":
            commands[how][-1] = str(steps)
        main(commands[how])
        assert (place / CARD).read_text() == "# Mine\n"
        assert {p.name for p in Path().iterdir()} <= {"out", "out-hf"} and not list(Path("out").glob("*kept*"))
    (place / CARD).unlink()
    if how in places:
        main(commands[how])
        assert (place / CARD).read_text().startswith("---\n")


def test_a_changed_card_is_not_damage(base, rows_file, tmp_path):
    run("lora", base, rows_file, tmp_path / "out", "--train.save_best", "true")
    (tmp_path / "out" / "best" / CARD).write_text("# Mine\n")
    assert damage(tmp_path / "out" / "best") is None
    (tmp_path / "out" / "best" / CARD).unlink()
    assert damage(tmp_path / "out" / "best") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---",
        "---\n",
        "---\n---\n",
        "---\n- a\n---\n",
        "---\na: [\n---\n",
        "---\na: !!x 1\n---\n",
        "# A\n---\na: 1\n---",
    ],
)
def test_a_base_with_another_card(text, llama, tmp_path):
    """It does not matter what a base has in the place of a card."""
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "base" / CARD).write_text(text)
    assert Facts.of_base(tmp_path / "base").license == {}
    (tmp_path / "base" / CARD).write_text("---\nlicense: [mit]\nlicense_name: 3\nlicense_link: |\n a\n b\n---\n")
    assert Facts.of_base(tmp_path / "base").license == {}
    (tmp_path / "base" / CARD).write_bytes(b"\xff")
    write_card(tmp_path / "base", "a", Facts.of_base(tmp_path / "base"), tmp_path)
    assert fields(tmp_path / "base")["library_name"] == "transformers"


def test_sources(tmp_path):
    assert hub_id(RowSource("hf:a/b")) == hub_id(RowSource("hf:a/b:train[:10]")) == "a/b"
    assert hub_id(RowSource(tmp_path / "a/b")) == ""
    (tmp_path / "a|b\n.csv").write_text("x\n")
    assert "hash 73cb3858a687" in describe_source(RowSource(tmp_path / "a|b\n.csv"), 1)
    assert table([("data", describe_source(RowSource(tmp_path / "a|b\n.csv"), 1))])[-1].count("|") == 4
    assert "hash unknown" in describe_source(RowSource(tmp_path / "gone.csv"), 1)
    source = RowSource(tmp_path / "a|b\n.csv")
    trained_on = source.fingerprint()
    (tmp_path / "a|b\n.csv").write_text("changed after the run began\n")
    assert source.fingerprint() == trained_on


def test_vllm():
    command = {"base_model_name_or_path": "a/b", "r": 9}
    assert "--max-lora-rank 16 " in vllm_command(command, ".")
    for more in (
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]},
        {"r": RANKS[-1] + 1},
    ):
        assert "merge_lora" in vllm_command({**command, **more}, ".")
