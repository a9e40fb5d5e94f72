"""Files as data: what `--data` takes, the options of each file, columns by similar names, and what is never lost."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from litgpt.__main__ import main
from litgpt.data import cache, token_maker, workers
from litgpt.data.columns import as_option, match
from litgpt.data.forms import FORMS, to_row
from litgpt.data.json_file import JSON, from_entries, is_data
from litgpt.data.tokens import IN_LOSS
from litgpt.errors import UserError
from litgpt.generate.prompt_file import Prompts, prompt_columns
from litgpt.text.prompts import load_style
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import make_rows
from tests.test_data_check import check, write


def pairs(n: int, prompt: str = "instruction", answer: str = "output", word: str = "q") -> list[dict]:
    return [{prompt: f"Say {word} {i}", answer: f"{word} {i}!"} for i in range(n)]


# columns


@pytest.mark.parametrize(
    ("fields", "form", "columns"),
    [
        ({"Question": "q", "Answer": "a"}, "question_answer", {"question": "Question", "answer": "Answer"}),
        ({"question ": "q", " ANSWER": "a"}, "question_answer", {"question": "question ", "answer": " ANSWER"}),
        ({"Instruction": "q", "Input": "i", "Out-put": "a"}, "alpaca",
         {"instruction": "Instruction", "input": "Input", "output": "Out-put"}),
        ({"instruction": "q", "output": "a", "System": "s"}, "alpaca", {"system": "System"}),
        ({"KTO tag": True, "prompt": "q", "Completion": "a"}, "label",
         {"kto_tag": "KTO tag", "completion": "Completion"}),
        ({"Messages": [{"role": "user", "content": "q"}]}, "messages", {"messages": "Messages"}),
        ({"prompt": "q", "response": "a"}, "alpaca", {"instruction": "prompt", "output": "response"}),
        ({"user": "q", "assistant": "a", "id": "7"}, "alpaca", {"instruction": "user", "output": "assistant"}),
        ({"Query": "q", "Reply": "a", "Context": "c"}, "alpaca",
         {"instruction": "Query", "output": "Reply", "context": "Context"}),
        ({"input": "q", "target": "a"}, "alpaca", {"instruction": "input", "output": "target"}),
        ({"dialogue": [{"from": "human", "value": "q"}], "id": 1}, "messages", {"messages": "dialogue"}),
        ({"content": "A text.", "url": "x"}, "text", {"text": "content"}),
        ({"instruction": "q", "output": "a", "Text": "t"}, "alpaca", {}),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "Label": 1}, "preference", {}),
    ],
)  # fmt: skip
def test_columns_by_similar_names(fields, form, columns):
    assert match(fields, "here") == (form, columns)


@pytest.mark.parametrize(
    "fields",
    [
        {"Ticket ID": "1", "Body text": "b"},
        {"question": "q", "query": "q", "response": "a"},  # which of them?
        {"Question": "q", "question ": "q", "Answer": "a"},
        {"prompt": "q", "answer": "a", "response": "b"},
        {"prompt": 3, "response": "a"},
    ],
)
def test_what_is_not_clear_is_not_guessed(fields):
    with pytest.raises(UserError, match="no columns that litgpt recognizes"):
        match(fields, "here")


@pytest.mark.parametrize("name", ["Question", "question ", "it's", 'a "b"', "a: b", "null", "ä", "{x}", "#"])
def test_a_guess_is_printed_as_the_flag_that_sets_it(name):
    flag, value = shlex.split(as_option({"question": name, "answer": "Answer"}))
    assert flag == "--data.columns" and yaml.safe_load(value) == {"question": name, "answer": "Answer"}


def test_guesses_of_several_files_are_printed_as_options_of_each(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("Question,Answer\nWhy?,So.\nHow?,So.\n")
    Path("b b.csv").write_text("Query,Reply\nWhy not?,So.\nHow not?,So.\n")
    _, out, _ = check(capsys, llama, "--data", "a.csv", "b b.csv")
    options = [line.partition("pass ")[2] for line in out.splitlines() if "similar names" in line]
    code, again, _ = check(capsys, llama, *shlex.split(" ".join(options)))
    assert code == 0 and "similar names" not in again and "b b.csv" in again
    _, out, _ = check(
        capsys, llama, "--data", "a.csv", "b b.csv", "--data.columns", "{instruction: Query, output: Reply}"
    )
    options = [line.partition("pass ")[2] for line in out.splitlines() if "similar names" in line]
    assert options == ["--data '{path: a.csv, columns: {question: Question, answer: Answer}}'"]
    main(["generate", str(llama), "--prompts", "a.csv", "b b.csv", "--max_new_tokens", "1"])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    options = [line.partition("pass ")[2] for line in err.splitlines() if "similar names" in line]
    assert prompt_columns({"dialogue": [{"from": "human", "value": "q"}]}) == {"messages": "dialogue"}
    assert prompt_columns({"content": "A text."}) == {}
    main(["generate", str(llama), *shlex.split(" ".join(options)), "--max_new_tokens", "1"])
    again, err = capsys.readouterr()
    assert len(options) == 2 and again == out and "similar names" not in err


def test_a_csv_file_with_other_headers_trains(llama, tmp_path, capsys):
    file = tmp_path / "support.csv"
    file.write_text("Question,Answer,Ticket ID\n" + "".join(f"Why {i}?,Because {i}.,{i}\n" for i in range(12)))
    main(["finetune", "lora", str(llama), str(file), "--out_dir", f"{tmp_path}/a", "--train.max_steps", "2"])
    out = capsys.readouterr().out
    option = "--data.columns '{question: Question, answer: Answer}'"
    assert option in out and "Ticket ID (12 rows)" in out
    with_option = ["--data", str(file), *shlex.split(option), "--out_dir", f"{tmp_path}/b", "--train.max_steps", "2"]
    main(["finetune", "lora", str(llama), *with_option])
    assert "--data.columns" not in capsys.readouterr().out
    first, second = (
        [line.split(",")[:4] for line in (tmp_path / name / "metrics.csv").read_text().splitlines()] for name in "ab"
    )
    assert [line[2] for line in first] == [line[2] for line in second], "the same losses"


# what names data


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with files of different kinds."""
    write(tmp_path / "a.jsonl", pairs(10))
    write(tmp_path / "b.jsonl", pairs(6, "prompt", "completion", "p"))
    (tmp_path / "c.csv").write_text("question,answer\n" + "".join(f"Why {i}?,So {i}.\n" for i in range(4)))
    (tmp_path / "book.txt").write_text("A text. " * 50)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "n"),
    [
        (["a.jsonl"], 10),
        (["--data", "a.jsonl"], 10),
        (["--data=a.jsonl"], 10),
        (["--data", "a.jsonl", "b.jsonl", "c.csv"], 20),
        (["a.jsonl", "--data", "c.csv"], 14),
        (["--data", "a.jsonl", "--data", "c.csv"], 14),
        (["--data", "*.jsonl"], 16),
        (["--data", "[a.jsonl, {path: b.jsonl, rows: 2}]"], 12),
        (["--data", "{path: b.jsonl, rows: 0.5}"], 3),
        (["--data", "a.jsonl", "{path: b.jsonl, rows: 2}", "[c.csv]"], 16),
        (["--data", "{path: b.jsonl, rows: 2}", "a.jsonl"], 12),
        (["{path: b.jsonl, rows: 2}", "a.jsonl"], 12),
        (["--data", "JSON", "--data.json_path", "a.jsonl"], 10),
        (["--data", "a.jsonl", "--data.on_bad_row", "skip"], 10),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_file_is_data(llama, files, monkeypatch, capsys, words, n, first):
    monkeypatch.chdir(files)
    both = [llama, *words] if first else [*words, "--checkpoint_dir", llama]
    code, out, err = check(capsys, *both, "--json", "--data.val_split_fraction", 0)
    assert code == 0, out + err
    assert json.loads(out)["counts"]["kept"] == n


@pytest.mark.parametrize("inner", ["a.jsonl", ["a.jsonl", {"path": "c.csv"}], {"path": "a.jsonl", "rows": 3}])
def test_data_in_a_config(llama, files, monkeypatch, capsys, inner):
    monkeypatch.chdir(files)
    (files / "c.yaml").write_text(yaml.safe_dump({"data": inner, "lora_r": 4}))
    code, out, err = check(capsys, llama, "--config", "c.yaml", "--json", "--data.val_split_fraction", 0)
    assert code == 0, err
    n = {str: 10, list: 14, dict: 3}[type(inner)]
    assert json.loads(out)["counts"]["kept"] == n
    code, out, err = check(capsys, llama, "--config", "c.yaml", "--data", "b.jsonl", "--json")
    assert json.loads(out)["counts"]["kept"] == 6, "a flag replaces the files of a config"


def test_files_of_a_flag_do_not_inherit_what_a_config_says_of_others(llama, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    inner = {
        "json_path": "b.jsonl",
        "val_path": "a.jsonl",
        "columns": {"instruction": "prompt", "output": "completion"},
    }
    (files / "c.yaml").write_text(yaml.safe_dump({"data": {"class_path": "JSON", "init_args": inner}}))
    code, out, err = check(capsys, llama, "--config", "c.yaml", "--data", "c.csv", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["counts"]["kept"] == 4 and report["val_counts"] is None


def test_a_text_is_a_document(llama, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert from_entries(["book.txt"])[0] == "TextFiles"
    assert from_entries(["book.txt", "a.jsonl"])[0] == "JSON"
    code, out, err = check(capsys, llama, "book.txt", "--json", "--data.val_split_fraction", 0)
    assert code == 0 and json.loads(out)["counts"]["forms"] == {"document": 1}, err


def test_words_that_name_data(llama, files, monkeypatch):
    monkeypatch.chdir(files)
    for word in ("a.jsonl", "missing.csv", "hf:ORG/NAME", "x.json.gz", ".", "*.parquet"):
        assert is_data(word), word
    for word in ("fold*", "data/part-?"):
        assert is_data(word), word
    (files / "run").mkdir()
    (files / "run" / "hyperparameters.yaml").touch()
    (files / "run" / "metrics.csv").touch()
    for word in ("pico", "Alpaca", "ORG/NAME", str(llama), "my.module.Class", "lora", "", "run"):
        assert not is_data(word), word


@pytest.mark.parametrize("name", ["JSON", "litgpt.data.JSON"])
def test_a_data_set_by_its_class(llama, files, monkeypatch, capsys, name):
    monkeypatch.chdir(files)
    code, out, err = check(capsys, llama, "--data", name, "--data.json_path", "a.jsonl", "--json")
    assert code == 0 and json.loads(out)["counts"]["kept"] == 10, err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["a.jsnl"], "Expected one model, got 2"),
        (["aa.jsonl"], "Did you mean 'a.jsonl'?"),
        (["--data", "*.parquet"], "No file matches"),
        (["--data", "nothing*"], "No file matches"),
        (["--data", "ORG/NAME"], "hf:ORG/NAME"),
        (["--data", "nothing/"], "no such file or folder"),
        (["--data", "empty"], "no file of rows"),
        (["--data", "[]"], "data is empty"),
        (["--data", "{path: ''}"], "expected one path"),
        (["--data", "{path: [a.jsonl, b.jsonl]}"], "expected one path"),
        (["--data", "{path: a.jsonl, columns: {instruction: 3}}"], "columns {'instruction': 3}"),
        (["--data", "a.jsonl", "--data.format", "alpca"], "Did you mean 'alpaca'?"),
        (["--data", "a.jsonl", "--data", "Dolly"], "--data Dolly"),
        (["--data", "[a.jsonl, {path: c.csv, weight: 2}]", "--data.weights", "[1, 1]"], "c.csv has a weight"),
        (["a.jsonl", "--data.val_path", "b.jsonl", "--data.val_split_fraction", "0.1"], "pass null"),
        (["--data", "--show", "0"], "--data needs a value"),
        (["--data", "semicolons.csv"], "one cell with ';'"),
        (["--data", "broken.jsonl"], "No file 'broken.jsonl' (--data.json_path)."),
        (["a.jsonl", "--list", "bad"], "--list"),
        (["a.jsonl", "--show", "-1"], "--show -1"),
        (["--data", "{path: a.jsonl, row: 3}"], "'row'. Did you mean 'rows'?"),
        (["--data", "{path: a.jsonl, rows: 0}"], "rows 0"),
        (["--data", "{path: a.jsonl, weight: -1}"], "weight -1"),
        (["--data", "{path: a.jsonl, form: alpca}"], "Did you mean 'alpaca'?"),
        (["--data", "{path: a.jsonl, columns: x}"], "columns x"),
        (["--data", "{path: a.jsonl, split: test}"], "split test"),
        (["--data", "{path: a.jsonl, split: val}"], "training rows"),
        (["--data", "a.jsonl", "--data.columns", "{context: nothing}"], "no row has nothing"),
    ],
)
def test_what_cannot_be_read_is_named(llama, files, monkeypatch, capsys, words, named):
    monkeypatch.chdir(files)
    (files / "empty").mkdir()
    (files / "semicolons.csv").write_text("question;answer\nWhy?;So.\n")
    (files / "broken.jsonl").symlink_to("nothing.jsonl")
    code, out, err = check(capsys, llama, *words, "--json")
    assert code in (1, 2) and named in out + err, out + err
    assert "mean 'broken.jsonl'" not in err


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train.jsonl", "val.jsonl"], ["train.jsonl"], ["val.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000.jsonl"],
         ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["test-00000.jsonl"]),
        (["train/a.jsonl", "validation/a.jsonl", "test/a.jsonl"], ["train/a.jsonl"], ["validation/a.jsonl"]),
        (["one.jsonl", "two.csv", ".hidden.jsonl"], ["one.jsonl", "two.csv"], []),
        (["a.jsonl", "dev.jsonl"], ["a.jsonl"], ["dev.jsonl"]),
        (["a.jsonl", "notes.txt"], ["a.jsonl"], []),
    ],
)  # fmt: skip
def test_a_folder(tmp_path, capsys, names, train, val):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, pairs(3))
    found_train, found_val = JSON(str(tmp_path)).sources()
    assert all(str(s.path).endswith(name) for s, name in zip(found_train, train, strict=True))
    assert all(str(s.path).endswith(name) for s, name in zip(found_val or [], val, strict=True))
    unused = len(names) - len(train) - len(val) - any(name.startswith(".") for name in names)
    assert ("not used" in capsys.readouterr().err) == bool(unused)


def test_a_folder_with_links_and_the_result_of_a_run(llama, tmp_path, capsys):
    """A linked folder counts once, and the files of a run are not rows."""
    (tmp_path / "data").mkdir()
    (tmp_path / "more").mkdir()
    write(tmp_path / "data" / "a.jsonl", pairs(6))
    write(tmp_path / "more" / "b.jsonl", pairs(6, word="m"))
    (tmp_path / "data" / "link").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "data")
    words = ["finetune", "lora", str(llama), str(tmp_path / "data"), "--out_dir", str(tmp_path / "data" / "out")]
    for _ in range(2):
        main([*words, "--train.max_steps", "1", "--overwrite"])
        out, err = capsys.readouterr()
        assert "12 read" in out and "not used" not in err


def test_a_folder_of_validation_files(llama, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    (files / "held").mkdir()
    write(files / "held" / "test.jsonl", pairs(3, word="held"))
    code, out, err = check(capsys, llama, "a.jsonl", "--data.val_path", "held", "--json")
    assert code == 0 and json.loads(out)["val_counts"]["kept"] == 3, err
    code, _, err = check(capsys, llama, "held")
    assert code == 2 and "training rows" in err
    assert len(list(Prompts("held").rows())) == 3


def test_a_folder_with_one_set_in_two_formats(tmp_path):
    for name in ("train.jsonl", "train.csv"):
        write(tmp_path / name, pairs(3))
    with pytest.raises(UserError, match=r"train\.csv"):
        JSON(str(tmp_path)).sources()


# five files of different forms


def test_a_mixture_adds_up(llama, tmp_path, monkeypatch, capsys):
    """Each with broken rows, weights, and an own mapping; checked and trained with one command."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chats = [{"messages": [{**turns[0], "content": f"Hi {i}"}, turns[1]], "source": "web"} for i in range(40)]
    Path("chats.jsonl").write_text("\n".join([*map(json.dumps, chats[:20]), "{broken", *map(json.dumps, chats[20:])]))
    dolly = [*pairs(30, "prompt", "response", "d"), {"prompt": "x", "response": None}]
    Path("dolly.json").write_text(json.dumps(dolly))
    Path("support.csv").write_text("Question ,ANSWER\n" + "".join(f"How {i}?,So {i}.\n" for i in range(20)) + "a,b,c\n")
    shares = [
        {"conversations": [{"from": "human", "value": f"h {i}"}, {"from": "gpt", "value": "g"}]} for i in range(25)
    ]
    parquet.write_table(pyarrow.Table.from_pylist([*shares, {"conversations": []}]), "share.parquet")
    write(Path("alpaca.jsonl"), [*pairs(50), {"instruction": 3, "output": "x"}])
    write(Path("held.jsonl"), pairs(8, word="held"))
    Path("mix.yaml").write_text("""
data:
  - {path: chats.jsonl}
  - {path: dolly.json, columns: {instruction: prompt, output: response}, weight: 0.5}
  - {path: support.csv, weight: 2}
  - {path: share.parquet, rows: 10}
  - {path: alpaca.jsonl, rows: 0.5}
  - {path: held.jsonl, split: val}
""")
    code, out, _ = check(capsys, llama, "--config", "mix.yaml", "--json")
    report = json.loads(out)
    table = {line["file"]: (line["rows"], line["used"], line["skipped"], line["weight"]) for line in report["files"]}
    assert table == {
        "chats.jsonl": (41, 40, 1, 1),
        "dolly.json": (31, 30, 1, 0.5),
        "support.csv": (21, 20, 1, 2),
        "share.parquet": (10, 10, 0, 1),
        "alpaca.jsonl": (25, 25, 0, 1),
    }
    assert code == 1 and len(report["problems"]) == 3 and report["counts"]["rows"] == 128
    assert report["train"]["rows"] == 40 + 15 + 2 * 20 + 10 + 25 and report["val"]["rows"] == 8
    assert report["counts"]["ignored"] == {"source": 40}
    assert sum(line["tokens"] for line in report["files"]) == report["counts"]["tokens"]

    code, out, _ = check(capsys, llama, "--config", "mix.yaml", "--list", "bad")
    listed = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [(r["file"], r["row"]) for r in listed] == [
        ("chats.jsonl", 21), ("dolly.json", 31), ("support.csv", 22)]  # fmt: skip
    main(["finetune", "lora", str(llama), "--config", "mix.yaml", "--data.on_bad_row", "skip", "--out_dir", "out",
          "--train.max_steps", "2"])  # fmt: skip
    assert "128 read" in capsys.readouterr().out and Path("out/final").is_dir()


@pytest.mark.parametrize("kind", ["bad", "too long"])
def test_what_a_check_leaves_in_the_cache_does_not_hide_bad_rows(llama, tmp_path, capsys, kind):
    """It reads on where a run stops."""
    row = {"instruction": 3, "output": "x"} if kind == "bad" else {"instruction": "x", "output": "y " * 500}
    file = write(tmp_path / "a.jsonl", [*pairs(20), row])
    words = [llama, file, "--data.too_long", "error"]
    assert check(capsys, *words)[0] == 1
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "lora", *map(str, words), "--out_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and "line 21" in capsys.readouterr().err
    assert check(capsys, *words, "--data.on_bad_row", "skip")[0] == 0
    for row in ("[1, 2]", '"x"', "3"):
        (tmp_path / "b.jsonl").write_text(json.dumps(pairs(1)[0]) + "\n" + row)
        code, out, _ = check(capsys, llama, tmp_path / "b.jsonl")
        assert code == 1 and "line 2, is" in out


@pytest.mark.parametrize("flags", [[], ["--data.on_bad_row", "skip"]])
@pytest.mark.parametrize("n", [0, 20])
def test_a_check_reads_on_behind_a_bad_first_row(llama, tmp_path, capsys, n, flags):
    (tmp_path / "a.jsonl").write_text("\n".join(["{broken", '{"x": 1}', "[1]", *map(json.dumps, pairs(n))]))
    code, out, _ = check(capsys, llama, tmp_path / "a.jsonl", "--list", "bad", *flags)
    assert code == 1 and [json.loads(line)["row"] for line in out.splitlines()] == [1, 2, 3]
    code, out, _ = check(capsys, llama, tmp_path / "a.jsonl", "--json", *flags)
    assert code == 1 and json.loads(out)["counts"]["kept"] == n


def test_more_than_a_tenth_bad_is_an_error_of_the_check(llama, tmp_path, capsys):
    for n_bad, expected in ((1, 0), (3, 1)):
        file = write(tmp_path / f"{n_bad}.jsonl", [*pairs(20), *({"x": 1} for _ in range(n_bad))])
        code, out, _ = check(capsys, llama, file, "--data.on_bad_row", "skip")
        assert code == expected and (f"{n_bad} of {20 + n_bad} rows" in out) == bool(expected)


# duplicates, and rows by number


def test_duplicates(llama, tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [*pairs(5), pairs(5)[2]])
    b = write(tmp_path / "b.jsonl", [pairs(5)[0], *pairs(3, word="z")])
    words = [llama, "--data", f"[{a}, {{path: {b}, weight: 2}}]", "--data.val_split_fraction", 0]
    for flags, n, n_equal in (([], 6 + 8, 2), (["--data.duplicates", "drop"], 5 + 2 * 3, 0)):
        code, out, _ = check(capsys, *words, *flags, "--json")
        report = json.loads(out)
        assert code == 0 and report["train"]["rows"] == n
        assert report["duplicates"]["train"] == n_equal, "weights do not count"
    code, out, _ = check(capsys, *words, "--list", "duplicates")
    listed = [json.loads(line) for line in out.splitlines()]
    assert [(Path(r["file"]).name, r["row"]) for r in listed] == [("a.jsonl", 6), ("b.jsonl", 1)]
    assert f"{a}, line 3" in listed[0]["reason"] and f"{a}, line 1" in listed[1]["reason"]


def test_a_small_weight_takes_a_row(llama, tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", pairs(5)), write(tmp_path / "b.jsonl", pairs(3, word="z"))
    words = [llama, "--data", f"{{path: {a}, weight: 0.01}}", b, "--data.val_split_fraction", 0]
    assert json.loads(check(capsys, *words, "--json")[1])["train"]["rows"] == 4


def test_rows_by_their_number(llama, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [*pairs(5), {"instruction": 1, "output": "x"}, *pairs(3, word="z")])
    _, out, _ = check(capsys, llama, file, "--show", 0, "--rows", "2,6,8,77", "--data.on_bad_row", "skip")
    shown = out[out.index("line 2: ") :]
    assert "Say q 1" in shown and "Say z 1" in shown and "Say q 2" not in shown
    assert "row 6" in shown and "not a string" in shown and "row 77: no such row" in shown
    _, out, _ = check(capsys, llama, file, "--show", 0, "--sample", 2, "--data.on_bad_row", "skip")
    assert out.count(": target tokens are") == 2


def test_lengths_are_those_before_truncation(llama, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": f"{i} " * 20 * i} for i in range(1, 11)])
    code, out, _ = check(capsys, llama, file, "--train.max_seq_length", 100, "--json", "--data.prompt_style", "none")
    report = json.loads(out)
    assert code == 0 and report["train"]["longest"] == 100 < report["lengths"]["p50"] < report["lengths"]["max"]
    words = [llama, file, "--train.max_seq_length", 100, "--data.prompt_style", "none"]
    _, out, _ = check(capsys, *words, "--list", "truncated")
    listed = [json.loads(line) for line in out.splitlines()]
    assert len(listed) == report["counts"]["truncated"] and "the limit is 100" in listed[0]["reason"]


def test_the_check_needs_no_weights(llama, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (llama / name).exists():
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / name).write_bytes((llama / name).read_bytes())
    code, out, err = check(capsys, tmp_path / "model", write(tmp_path / "a.jsonl", make_rows(5)))
    assert code == 0, out + err


# what a template does not show

PLAIN = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{{ eos_token }}" \
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather"}}
LOST = {
    "system": ({"system": "Speak like a sailor."}, {}, "system messages", "Speak like a sailor."),
    "tools": ({"tools": [TOOL]}, {}, "tool definitions", '"description": "Weather"'),
    "reasoning": ({}, {"reasoning": "Think of rain."}, "reasoning", "<think>\nThink of rain.\n</think>"),
    "thinking": ({}, {"thinking": "Think of rain."}, "reasoning", "<think>\nThink of rain.\n</think>"),
    "reasoning_content": ({}, {"reasoning_content": "Think of rain."}, "reasoning", "Think of rain."),
    "calls": ({}, {"tool_calls": [CALL]}, "tool calls",
              '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}'),
    "field": ({}, {"mood": "merry"}, "message field 'mood'", "mood: merry"),
}  # fmt: skip


def with_part(form: str, name: str) -> dict:
    """A row of a form with a part that a plain template does not show."""
    beside, within, _, _ = LOST[name]
    answer = {"role": "assistant", "content": "Yes.", **within}
    user = {"role": "user", "content": "Rain?"}
    shared = {**beside, **{k: v for k, v in within.items() if k in ("reasoning", "thinking", "reasoning_content")}}
    return {
        "messages": {"messages": [user, answer], **beside},
        "sharegpt": {
            "conversations": [{"from": "human", "value": user["content"]},
                              {"from": "gpt", "value": "Yes.", **within}], **beside},
        "alpaca": {"instruction": user["content"], "output": "Yes.", **shared},
        "history": {"instruction": "And now?", "output": "Yes.", "history": [["Hi", "Hello"]], **shared},
        "question_answer": {"question": user["content"], "answer": "Yes.", **shared},
        "prompt_completion": {"prompt": [user], "completion": [answer], **beside},
        "preference": {"prompt": [user], "chosen": [answer], "rejected": [{**answer, "content": "No."}], **beside},
        "label": {"prompt": [user], "completion": [answer], "label": True, **beside},
        "ranked": {"prompt": [user], "answers": [[answer], "No."], "scores": [2, 1], **beside},
    }[form]  # fmt: skip


FORMS_WITH_MESSAGES = ("messages", "sharegpt", "prompt_completion", "preference", "label", "ranked")


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "text"])
def test_what_a_template_does_not_show_is_an_error_or_text(llama, tmp_path, capsys, form, name):
    if name in ("calls", "field") and form not in FORMS_WITH_MESSAGES:
        pytest.skip("a form without messages has no such part")
    template = tmp_path / "t.jinja"
    template.write_text(PLAIN)
    file = write(tmp_path / "a.jsonl", [with_part(form, name), {**with_part(form, name), "tools": [], "system": ""}])
    kind, shown = LOST[name][2:]
    words = [llama, file, "--data.prompt_style", template, "--data.val_split_fraction", 0]
    code, out, _ = check(capsys, *words)
    assert code == 1 and f"have {kind} that the prompt style" in out and "a.jsonl, line 1" in out
    _, out, _ = check(capsys, *words, "--list", "lost")
    assert {json.loads(line)["reason"] for line in out.splitlines()} == {kind}
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "lora", *map(str, words), "--out_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and kind in capsys.readouterr().err

    code, out, _ = check(capsys, *words, "--data.on_lost", "as_text", "--show", 5)
    assert code == 0 and shown in out and "became texts" in out
    code, out, _ = check(capsys, *words, "--data.on_lost", "drop_row", "--json")
    report = json.loads(out)
    n_kept = name in ("system", "tools")  # the second row has none
    assert report["counts"]["kept"] == n_kept and report["counts"]["dropped_lost"] == 2 - n_kept
    assert code == (0 if n_kept else 1)


REFUSES = "{% for m in messages %}{% if m.role not in ('user', 'assistant') or m.tool_calls %}" \
    "{{ raise_exception('no such role') }}{% endif %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}" \
    "{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip


@pytest.mark.parametrize("name", ["system", "tools", "calls"])
def test_what_a_template_refuses_becomes_text(llama, tmp_path, capsys, name):
    template = tmp_path / "t.jinja"
    template.write_text(REFUSES)
    file = write(tmp_path / "a.jsonl", [with_part("messages", name)] * 2)
    words = [llama, file, "--data.prompt_style", template, "--data.val_split_fraction", 0]
    code, out, _ = check(capsys, *words, "--data.on_lost", "as_text")
    assert code == 0 and LOST[name][3] in out, out
    if name != "tools":  # which it does not show, but does not refuse either
        code, out, _ = check(capsys, *words)
        assert code == 1 and "--data.on_lost as_text" in out
    write(file, [with_part("messages", name), *pairs(2)])
    code, out, _ = check(capsys, *words, "--data.on_lost", "drop_row", "--json")
    counts = json.loads(out)["counts"]
    assert code == 0 and (counts["kept"], counts["dropped_lost"], counts["bad"]) == (2, 1, 0)
    write(file, [{"messages": [{"role": "user", "content": "Hi"}] * 2 + [{"role": "assistant", "content": "Ho"}]}])
    template.write_text("{{ raise_exception('never') }}")
    code, out, _ = check(capsys, *words)
    assert code == 1 and "on_lost" not in out and "Fix the row" in out


def test_the_advice_is_another_style(llama, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(PLAIN)
    for name, style, advised in (("reasoning", template, True), ("field", template, False), ("field", "chatml", False)):
        file = write(tmp_path / "a.jsonl", [with_part("messages", name)] * 2)
        _, out, _ = check(capsys, llama, file, "--data.prompt_style", style)
        assert ("such as chatml" in out) == advised and "on_lost" in out


def test_text_of_calls_is_trained_and_results_are_not(llama, tmp_path):
    """A conversation with tools in a style without them."""
    messages = [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "rain", "name": "weather"},
        {"role": "tool", "content": "sun", "name": "weather"},
        {"role": "assistant", "content": "Perhaps."},
    ]
    template = tmp_path / "t.jinja"
    template.write_text(PLAIN)
    file = write(tmp_path / "a.jsonl", [{"messages": messages, "tools": [TOOL]}])
    data = JSON(str(file), prompt_style=str(template), on_lost="as_text", val_split_fraction=0)
    tokenizer = Tokenizer(llama)
    ids, mask = data.load(tokenizer, llama, 2000).train.row(0)
    text = tokenizer.decode(ids.tolist(), skip_special=False)
    trained = tokenizer.decode(ids[(mask & IN_LOSS).bool()].tolist(), skip_special=False)
    assert text.count("<user>") == 2, "results in a row are one message"
    assert "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun" in text and '"name": "weather"' in text
    assert trained.count("<tool_call>") == 2 and "Perhaps." in trained
    assert "tool_response" not in trained and "<tools>" not in trained and "rain?" not in trained


def test_a_mapped_optional_column_may_be_missing_in_some_rows(llama, tmp_path, capsys):
    rows = [{**row, **({"Input": f"more {i}"} if i % 3 == 2 else {})} for i, row in enumerate(pairs(9))]
    file = write(tmp_path / "a.jsonl", rows)
    words = [llama, file, "--data.val_split_fraction", 0, "--json"]
    guessed = json.loads(check(capsys, *words)[1])
    code, out, _ = check(capsys, *words, "--data.columns", "{input: Input}")
    report = json.loads(out)
    assert code == 0 and report["counts"]["tokens"] == guessed["counts"]["tokens"]
    assert report["counts"]["mapped"] == {"Input": 3}
    code, out, err = check(capsys, *words[:1], write(tmp_path / "b.jsonl", pairs(3, word="b")), *words[1:],
                           "--data.columns", "{input: Input}")  # fmt: skip
    assert code == 0 and json.loads(out)["counts"]["kept"] == 12, err
    prompts = Prompts({"path": str(file), "columns": {"input": "Input"}})
    with pytest.raises(UserError, match="missing Input"):
        prompts.messages(rows[0], f"{file}, line 1", None)


def test_messages_after_the_last_answer_are_counted(llama, tmp_path, capsys):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"messages": chat}, {"messages": [*chat, {"role": "user", "content": "And now?"}]}]
    code, out, _ = check(capsys, llama, write(tmp_path / "a.jsonl", rows))
    assert code == 0 and "messages after the last answer (1 rows)" in out


def test_a_column_without_a_name_is_named(llama, tmp_path, capsys):
    (tmp_path / "a.csv").write_text(",question,answer\n0,Why?,So.\n1,How?,So.\n")
    code, out, _ = check(capsys, llama, tmp_path / "a.csv")
    assert code == 0 and "'' (2 rows)" in out
    (tmp_path / "a.csv").write_text('"a, b"\nWhy?\nHow?\n')
    code, out, err = check(capsys, llama, tmp_path / "a.csv", "--data.columns", "{text: 'a, b'}")
    assert code == 0, err


def test_the_table_of_files_stays_readable_on_a_narrow_terminal(llama, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = check(capsys, llama, "--data", "a.jsonl", "b.jsonl", "--show", 0)
    assert code == 0 and "a.jsonl" in out and "b.jsonl" in out and "truncated" in out


def test_columns_that_are_not_used_are_counted(llama, tmp_path, capsys):
    rows = [{**row, "id": i, "meta": {"a": 1}, "empty": None} for i, row in enumerate(pairs(6))]
    chats = [{"messages": [{"role": "user", "content": "Hi", "id": "m1"}, {"role": "assistant", "content": "Ho"}]}]
    code, out, _ = check(capsys, llama, write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", chats), "--json")
    assert code == 0 and json.loads(out)["counts"]["ignored"] == {"id": 6, "meta": 6, "messages.id": 1}


# variables of the template

THINKING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}" \
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}" \
    "(no thoughts){% endif %}{% endif %}"  # fmt: skip
STYLED = "{% if style is defined %}[{{ style }}]{% endif %}" + THINKING


def test_rows_pass_variables_to_the_template(llama, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(STYLED)
    rows = [{**pairs(3)[0], "chat_template_kwargs": {"style": "formal"}}, pairs(3)[1],
            {**pairs(3)[2], "chat_template_kwargs": '{"style": "casual"}'}]  # fmt: skip
    file, tokenizer = write(tmp_path / "a.jsonl", rows), Tokenizer(llama)
    for kwargs, expected in (
        (None, ["[formal]", "<user>", "[casual]"]),
        ({"style": "x"}, ["[formal]", "[x]", "[casual]"]),
    ):
        data = JSON(str(file), prompt_style=str(template), template_kwargs=kwargs, val_split_fraction=0)
        loaded = data.load(tokenizer, llama, 200)
        texts = [tokenizer.decode(loaded.train.row(i)[0].tolist()) for i in range(3)]
        assert [text.startswith(start) for text, start in zip(texts, expected)] == [True] * 3, texts
    with pytest.raises(UserError, match="messages"):
        JSON(str(file), prompt_style=str(template), template_kwargs={"messages": []}).load(tokenizer, llama, 200)
    write(file, [{**pairs(1)[0], "chat_template_kwargs": {"messages": []}}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: "):
        JSON(str(file), prompt_style=str(template)).load(tokenizer, llama, 200)
    with pytest.raises(UserError, match="alpaca"):
        JSON(str(file), prompt_style="alpaca", template_kwargs={"style": 1}).load(tokenizer, llama, 200)
    for wrong in ({"stile": "x"}, {"style": float("inf")}):
        with pytest.raises(UserError, match=r"'sti|'style' cannot be inf"):
            JSON(str(file), prompt_style=str(template), template_kwargs=wrong).load(tokenizer, llama, 200)


def test_variables_of_a_run_are_saved_with_the_result(llama, tmp_path):
    """As defaults of the chat template, so that other programs have them too."""
    transformers = pytest.importorskip("transformers")
    template = tmp_path / "t.jinja"
    template.write_text("\n" + THINKING)  # its first line break must stay
    file = write(tmp_path / "a.jsonl", pairs(6))
    main(["finetune", "full", str(llama), str(file), "--data.prompt_style", str(template), "--data.template_kwargs",
          "{enable_thinking: false}", "--out_dir", f"{tmp_path}/out", "--train.max_steps", "1"])  # fmt: skip
    final, messages = tmp_path / "out" / "final", [{"role": "user", "content": "Hi"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    original = transformers.AutoTokenizer.from_pretrained(llama)
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        ours = load_style(final).with_variables(kwargs).prompt(messages)
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
        asked = {"enable_thinking": False, **kwargs}
        expected = original.apply_chat_template(
            messages, chat_template=template.read_text(), add_generation_prompt=True, tokenize=False, **asked
        )
        assert ours == theirs == expected
        assert ("(no thoughts)" in ours) == (not asked["enable_thinking"])


# size


@pytest.mark.parametrize("n_processes", [1, 2])
def test_processes_make_the_same_tokens(llama, tmp_path, monkeypatch, n_processes):
    """Also counts, bad rows, guesses, and their order."""
    rows = [{"Question": f"Why {i}?", "Answer": f"So {i}." * (i % 7), "id": i} for i in range(230)]
    lines = [json.dumps(row) for row in rows]
    lines[50], lines[200] = "{", '{"Question": 3, "Answer": "x"}'
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines))
    data = JSON(str(file), on_bad_row="skip", val_split_fraction=0)
    before, made = os.environ.get("TOKENIZERS_PARALLELISM"), []
    for at_once, n in ((1000, 1), (7, n_processes)):
        monkeypatch.setattr(token_maker, "AT_ONCE", at_once)
        monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid, n=n: set(range(n)))
        monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / f"{at_once}"))
        made.append(data.load(Tokenizer(llama), llama, 200))
    one, other = made
    assert torch.equal(one.train.ids, other.train.ids) and torch.equal(one.train.loss_mask, other.train.loss_mask)
    assert torch.equal(one.train.starts, other.train.starts) and torch.equal(one.train.hashes, other.train.hashes)
    assert one.counts == other.counts and one.counts.bad == 2 and one.notes() == other.notes()
    with pytest.raises(UserError, match="line 51"):
        JSON(str(file), val_split_fraction=0).load(Tokenizer(llama), llama, 200)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


INTERRUPTED = """
import sys
from pathlib import Path
from litgpt.data import token_maker
from litgpt.data.json_file import JSON
from litgpt.text.tokenizer import Tokenizer
token_maker.AT_ONCE = 10
folder = Path(sys.argv[1])
print("ready", flush=True)
JSON(sys.argv[2]).load(Tokenizer(folder), folder, 200, on_progress=lambda n, total: print(n, flush=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_work_leaves_no_processes_and_no_file(llama, tmp_path, how):
    file = write(tmp_path / "a.jsonl", pairs(20_000))
    environment = {**os.environ, "LITGPT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", INTERRUPTED, str(llama), str(file)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    while (line := process.stdout.readline().strip()) == "ready" or int(line) < 500:
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(how)
    process.communicate(timeout=60)
    end = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not list((tmp_path / "cache" / "tokens").glob("*.safetensors"))


def test_the_cache_has_a_limit(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    tokenizer = Tokenizer(llama)

    def load(name: str) -> Path:
        file = tmp_path / name
        if not file.exists():
            write(file, pairs(50, word=name))
        before = set(cache.cache_files(cache.cache_folder()))
        JSON(str(file)).load(tokenizer, llama, 200)
        made = set(cache.cache_files(cache.cache_folder())) - before
        return made.pop() if made else Path()

    a, b = load("a.jsonl"), load("b.jsonl")
    os.utime(b, (1, 1))
    os.utime(a, (2, 2))
    load("b.jsonl")  # which is used again, so a is now the oldest
    monkeypatch.setenv("LITGPT_CACHE_GB", str(2.5 * a.stat().st_size / 1e9))
    c = load("c.jsonl")
    assert not a.exists() and b.exists() and c.exists()
    main(["data", "cache"])
    out = capsys.readouterr().out
    assert b.name[:12] in out and "2 files" in out and "LITGPT_CACHE_GB" in out
    main(["data", "cache", "clear"])
    assert not b.exists() and not c.exists() and "Removed 2 files" in capsys.readouterr().out
    monkeypatch.setenv("LITGPT_CACHE_GB", "much")
    with pytest.raises(UserError, match="LITGPT_CACHE_GB=much"):
        load("d.jsonl")


def test_rows_of_every_form_are_read_alike_by_similar_names():
    """A header in capitals changes nothing."""
    examples = {
        "alpaca": {"instruction": "q", "input": "i", "output": "a", "system": "s"},
        "question_answer": {"question": "q", "answer": "a", "context": "c"},
        "prompt_completion": {"prompt": "q", "completion": "a"},
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "label": {"prompt": "q", "completion": "a", "label": True},
        "ranked": {"question": "q", "responses": ["a", "b"], "ranks": [1, 2]},
        "text": {"text": "t"},
        "history": {"instruction": "q", "output": "a", "history": [["x", "y"]]},
        "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    }
    assert examples.keys() == FORMS.keys()
    for form, fields in examples.items():
        for change in (str.upper, str.title, lambda name: f" {name} "):
            renamed = {change(key): value for key, value in fields.items()}
            found, columns = match(renamed, "here")
            assert found == form and to_row(renamed, found, "here", columns) == to_row(fields, form, "here")
