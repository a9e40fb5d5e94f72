"""`litgpt data check`: what it reports, what counts as a problem, and how bad rows are named or skipped."""

import json
import math
import shutil
from pathlib import Path

import pytest

from litgpt.__main__ import main
from litgpt.data import token_maker
from litgpt.data.check import data_problems
from litgpt.data.data_module import TokenizedDataset
from litgpt.data.json_file import JSON
from litgpt.data.pico import sums
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import TrainArgs
from litgpt.train.run import row_limit
from tests.conftest import make_rows


def check(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    try:
        main(["data", "check", *map(str, words)])
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def test_report_and_json(tmp_path, capsys):
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in sums()[:20]]
    file = write(tmp_path / "rows.jsonl", [{"messages": chat} for chat in [*chats, chats[0], chats[0]]])
    words = ["pico", "--data", "JSON", "--data.json_path", file, "--show", 30]
    code, out, _ = check(capsys, *words)
    assert code == 0
    line = next(line.split() for line in out.splitlines() if line.startswith(file.name))
    assert "22" in line and line[-1] == "messages" and "line 3: " in out and "No problems found." in out
    shown = [answer for _, answer in sums()[:20] if f"[[{answer}<|end|>]]" in out]
    assert len(shown) > 15 and out.count("<|end|>]]") == out.count(": target tokens are")

    code, out, _ = check(capsys, *words, "--json")
    report = json.loads(out)
    assert code == 0 and report["problems"] == []
    assert report["counts"]["rows"] == 22 and report["mask_prompt"] and report["prompt_style"] == "chat"
    assert report["train"]["rows"] + report["val"]["rows"] == 22
    duplicates = report["duplicates"]
    assert duplicates["train"] + duplicates["val"] == 2 and duplicates["across"] == 0
    assert sum(n for _, _, n in report["train"]["histogram"]) == report["train"]["rows"]
    assert 0 < report["train"]["trained_share"] < 0.5


def test_the_same_config_as_a_finetune(llama, tmp_path, rows_file, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"lora_r: 4\ndata:\n  class_path: JSON\n  init_args:\n    json_path: {rows_file}\n")
    code, out, _ = check(capsys, llama, "--config", config, "--lora_mlp", "true", "--train.max_steps", 3, "--json")
    assert code == 0 and json.loads(out)["counts"]["rows"] == 40


def problem(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture, *words: object) -> str:
    """The problem that the check finds and exits with 1 for; a finetune stops on the same."""
    code, out, _ = check(capsys, llama, *words)
    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("ERROR: ")).removeprefix("ERROR: ")
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "lora", str(llama), *map(str, words), "--out_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    return line


def test_validation_rows_that_are_trained_on(llama, tmp_path, capsys):
    rows = make_rows(20)
    train, val = write(tmp_path / "train.jsonl", rows), write(tmp_path / "val.jsonl", [*make_rows(5, seed=9), rows[3]])
    line = problem(llama, tmp_path, capsys, "--data", "JSON", "--data.json_path", train, "--data.val_path", val)
    assert "1 of 6 validation rows" in line


def test_no_trained_token(llama, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"instruction": "word " * 60, "output": "x"}] * 3)
    words = ["--data", "JSON", "--data.json_path", file, "--data.mask_prompt", "true", "--train.max_seq_length", 20]
    assert "Of 3 rows: 3 without a target token" in problem(llama, tmp_path, capsys, *words)


def test_stop_token_never_trained(llama, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"instruction": "a", "output": f"{i} " * 200} for i in range(5)])
    words = ["--data", "JSON", "--data.json_path", file, "--train.max_seq_length", 64]
    assert "No row trains a stop token" in problem(llama, tmp_path, capsys, *words)


def test_double_bos(llama, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    words = ["--data", "JSON", "--data.json_path", write(tmp_path / "rows.jsonl", make_rows(5)),
             "--data.prompt_style", template]  # fmt: skip
    assert "two BOS" in problem(llama, tmp_path, capsys, *words)


GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def message(role: str, content: object) -> dict:
    return {"messages": [{"role": role, "content": content}, {"role": "assistant", "content": "x"}]}


SURROGATE = '{"messages": [{"role": "user", "content": "a\\ud800"}, {"role": "assistant", "content": "x"}]}'
BAD = {
    "bad JSON": ('{"messages": [', "is not JSON"),
    "null": ("null", "is null"),
    "unknown role": (json.dumps(message("usr", "hi")), "'usr'"),
    "content is a number": (json.dumps(message("user", 3)), "a number"),
    "NUL": (json.dumps(message("user", "a\0b")), "NUL"),
    "half a surrogate": (SURROGATE, "surrogate"),
    "2 MB": (json.dumps(message("user", "x" * 2_000_000)), "2,000,000"),
    "no answer": (json.dumps({"messages": [{"role": "user", "content": "hi"}]}), "assistant"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_named_or_skipped(llama, tmp_path, capsys, kind):
    line, named = BAD[kind]
    file = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"hi {i}"}, GOOD["messages"][1]]}) for i in range(900)
    ]
    lines[730] = line
    file.write_text("\n".join(lines))
    words = [llama, "--data", "JSON", "--data.json_path", file]
    code, out, err = check(capsys, *words)
    (problem,) = [line for line in out.splitlines() if line.startswith("ERROR: ")]
    assert code == 1 and err == ""
    with pytest.raises(UserError) as stop:
        JSON(str(file)).load(Tokenizer(llama), llama, 256)
    for text in (problem, str(stop.value)):
        assert f"{file}, line 731" in text and named in text and "--data.on_bad_row skip" in text
    code, out, _ = check(capsys, *words, "--data.on_bad_row", "skip", "--json")
    assert code == 0 and json.loads(out)["counts"]["bad"] == 1
    assert json.loads(out)["train"]["rows"] + json.loads(out)["val"]["rows"] == 899


def test_turns_that_the_template_forbids(llama, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    twice = {"messages": [*GOOD["messages"], GOOD["messages"][1]]}
    file = write(tmp_path / "rows.jsonl", [GOOD] * 3 + [twice])
    code, out, _ = check(capsys, llama, "--data", "JSON", "--data.json_path", file, "--data.prompt_style", template)
    assert code == 1 and f"{file}, line 4" in out and "roles must alternate" in out and "--data.prompt_style" in out


@pytest.mark.parametrize(("too_long", "kept"), [("cut", 11), ("drop", 10), ("error", 10)])
def test_rows_that_are_too_long(llama, tmp_path, capsys, too_long, kept):
    rows = [{"instruction": f"{i}", "output": "y"} for i in range(10)] + [{"instruction": "b", "output": "z " * 300}]
    file = write(tmp_path / "rows.jsonl", rows)
    words = [llama, "--data", "JSON", "--data.json_path", file, "--data.too_long", too_long, "--json",
             "--train.max_seq_length", 150]  # fmt: skip
    code, out, _ = check(capsys, *words)
    report = json.loads(out)
    assert report["train"]["rows"] + report["val"]["rows"] == kept and report["lengths"]["max"] > 300
    if too_long == "error":
        (problem,) = report["problems"]
        assert code == 1 and "line 11" in problem and "--data.too_long cut or drop" in problem
    else:
        assert code == 0 and report["counts"]["truncated"] + report["counts"]["too_long"] == 1


def test_columns_weights_and_several_paths(llama, tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [{"q": f"q{i}", "a": "x"} for i in range(10)])
    b = write(tmp_path / "b.jsonl", [{"q": f"r{i}", "a": "y"} for i in range(10)])
    words = [llama, "--data", "JSON", "--data.json_path", f"[{a}, {b}]", "--data.val_split_fraction", 0, "--json"]
    columns = ["--data.columns", "{instruction: q, output: a}"]
    code, out, _ = check(capsys, *words, *columns, "--data.weights", "[2, 0.5]")
    assert code == 0 and json.loads(out)["train"]["rows"] == 25
    code, out, _ = check(capsys, *words)
    assert code == 1 and "a.jsonl" in out and "--data.columns" in out


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("by", ["columns", "format"])
def test_a_validation_file_has_its_own_columns(llama, tmp_path, capsys, skip, by):
    """What is said of the training file holds for it only where it has such columns, or is of that form."""
    rows, held = make_rows(20), make_rows(5, seed=9)
    renamed = [{"q": r["instruction"], "i": r["input"], "a": r["output"]} for r in rows] if by == "columns" else rows
    words = ["--data", "JSON", "--data.json_path", write(tmp_path / "train.jsonl", renamed)]
    words += (
        ["--data.columns", "{instruction: q, input: i, output: a}"] if by == "columns" else ["--data.format", "alpaca"]
    )
    words += ["--data.on_bad_row", "skip"] if skip else []
    chats = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": "x"}]}
        for r in held
    ]
    same = [{"q": r["instruction"], "i": r["input"], "a": r["output"]} for r in held]
    for number, val in enumerate((held, chats, same if by == "columns" else held)):
        path = write(tmp_path / f"val{number}.jsonl", val)
        code, out, err = check(capsys, llama, *words, "--data.val_path", path, "--json")
        assert not code, err
        report = json.loads(out)
        assert (report["val"]["rows"], report["val_counts"]["bad"]) == (5, 0)
    unlike = write(tmp_path / "unlike.jsonl", [{"x": 1}] * 4)
    code, out, err = check(capsys, llama, *words, "--data.val_path", unlike)
    assert code == 1 and "unlike.jsonl" in out, "a file without a usable row"


def test_the_cache_is_never_stale(llama, tmp_path, capsys):
    """A changed file, option or tokenizer makes new tokens."""
    file = write(tmp_path / "rows.jsonl", make_rows(10))

    def tokens(*words: object) -> int:
        _, out, _ = check(capsys, llama, "--data", "JSON", "--data.json_path", file, "--json", *words)
        report = json.loads(out)
        return report["train"]["tokens"] + report["val"]["tokens"]

    first = tokens()
    assert tokens() == first
    assert tokens("--train.max_seq_length", 100) < first
    assert tokens("--data.prompt_style", "none") < first
    write(file, [*make_rows(10)[:9], {"instruction": "other", "output": "other"}])
    assert tokens() != first


def test_what_the_cache_holds_is_whole_and_of_this_model(llama, tmp_path, monkeypatch):
    """A broken file is made again; an EOS that only `config.json` names counts."""
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    rows, model = write(tmp_path / "rows.jsonl", make_rows(10)), shutil.copytree(llama, tmp_path / "model")

    def load() -> TokenizedDataset:
        return JSON(str(rows), val_split_fraction=0).load(Tokenizer(model), model, 256)

    assert [load().cached, load().cached] == [False, True]
    (file,) = (tmp_path / "cache" / "tokens").iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"x" * len(whole), whole.replace(b"counts", b"cuonts")):
        file.unlink()
        file.write_bytes(broken)
        assert not load().cached and load().cached

    (model / "tokenizer_config.json").write_text("{}")
    config = json.loads((model / "config.json").read_text())
    for eos in (1, 7, 8):
        (model / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
        loaded = load()
        assert int(loaded.train.row(0)[0][-1]) == eos and not loaded.cached


def test_long_rows_are_tokenized_a_few_at_a_time(llama, tmp_path, monkeypatch):
    """Memory depends on the length of a row and not on their number."""
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_maker, "CHARACTERS", 1000)
    sizes = []
    encode_batch = Tokenizer.encode_batch

    def spy(self: Tokenizer, texts: list[str], special: list[bool]) -> list:
        sizes.append(sum(map(len, texts)))
        return encode_batch(self, texts, special)

    monkeypatch.setattr(Tokenizer, "encode_batch", spy)
    rows = write(tmp_path / "rows.jsonl", [{"text": f"{i} " + "x" * 300} for i in range(50)])
    loaded = JSON(str(rows), val_split_fraction=0).load(Tokenizer(llama), llama, 2048)
    assert len(loaded.train) == 50 and loaded.counts.rows == 50 and max(sizes) < 1400


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.inf], [1.0, math.nan]])
def test_weights_that_cannot_be(weights):
    with pytest.raises(UserError, match=r"--data\.weights"):
        JSON(["a.json", "b.json"], weights=weights)


# the length that the model reads


@pytest.mark.parametrize("flags", [[], ["--train.pack", "true"]])
@pytest.mark.parametrize("command", ["finetune lora", "finetune full", "finetune adapter", "pretrain", "data check"])
def test_more_than_the_model_reads(command, flags, base, rows_file, tmp_path, capsys):
    """It was lowered in silence."""
    model = ["--model_name", base, "--tokenizer_dir", base] if command == "pretrain" else [base]
    words = [*command.split(), *model, "--data", "JSON", "--data.json_path", rows_file, *flags]
    words += [] if command == "data check" else ["--out_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--train.max_seq_length", "257"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "--train.max_seq_length 257" in error and "max_position_embeddings 256" in error


@pytest.mark.parametrize(
    ("asked", "pack", "limit"),
    [(None, False, 4096), (4096, False, 4096), (100, False, 100), (None, True, 2048), (4096, True, 4096)],
)
@pytest.mark.parametrize("learned", [False, True])
def test_the_limit_of_rows_and_packs(asked, pack, limit, learned):
    config = Config(block_size=4096, learned_positions=learned)
    assert row_limit(TrainArgs(max_seq_length=asked, pack=pack), config, JSON("x")) == limit
    with pytest.raises(UserError, match="n_positions 4096" if learned else "max_position_embeddings 4096"):
        row_limit(TrainArgs(max_seq_length=4097, pack=pack), config, JSON("x"))


@pytest.mark.parametrize("limit", [100, 256])
def test_advice_that_works(limit, llama, tmp_path, capsys):
    """What the model does not read cannot be allowed: raising the limit is no advice then."""
    file = write(tmp_path / "rows.jsonl", [{"instruction": "a", "output": f"{i} " * 400} for i in range(5)])
    for flags in ([], ["--data.too_long", "error"]):
        words = [llama, "--data", "JSON", "--data.json_path", file, "--train.max_seq_length", limit, *flags]
        code, out, err = check(capsys, *words)
        line = next(line for line in (out + err).splitlines() if "ERROR" in line or "error: " in line)
        assert code in (1, 2)
        assert ("Raise" in line) == (limit < 256) and ("Shorten" in line) == (limit == 256), line
    rows = [{"instruction": "a", "output": "b"}] * 5
    file = write(tmp_path / "short.jsonl", rows)
    loaded = JSON(str(file), prompt_style="none").load(Tokenizer(llama), llama, limit, context=256)
    ((_, counts),) = loaded.sources
    counts.no_stop = counts.kept  # none of them truncated
    (line,) = data_problems(loaded)
    assert "max_seq_length" not in line and "--data.prompt_style" in line


@pytest.mark.parametrize(("n_shared", "is_problem"), [(0, False), (2, False), (3, True)])
def test_validation_rows_that_are_training_rows(n_shared, is_problem, tmp_path, capsys, llama):
    """A few, as in published data sets, are reported. Many make the validation loss useless."""
    rows = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(60)]
    train = write(tmp_path / "train.jsonl", rows[:40])
    val = write(tmp_path / "val.jsonl", rows[40 - n_shared : 60 - n_shared])
    words = ["--data", "JSON", "--data.json_path", train, "--data.val_path", val]
    code, out, err = check(capsys, llama, *words)
    assert code == (1 if is_problem else 0), err
    assert (f"{n_shared} of 20 validation rows are also training rows" in out + err) == bool(n_shared)
