"""`litgpt generate`: one prompt, a file of prompts, stdin, and LitGPT's names for the same."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.data.row_files import read_rows
from litgpt.errors import UserError
from litgpt.generate.answer_format import JSONLines, answer_format
from litgpt.generate.answers import decode, in_order, stop_strings
from litgpt.generate.engine import Engine, Request, generate
from litgpt.generate.inference_model import DEFAULT_PROMPT, InferenceModel
from litgpt.generate.prompt_file import Prompts, n_answered
from litgpt.model.blocks import check_compiler

GREEDY = ["--temperature", "0", "--precision", "32-true", "--accelerator", "cpu"]
ROWS: list[Any] = [
    {"prompt": "Hello", "id": 7, "x": float("nan")},
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Me"}], "answer": "?"},
    {"instruction": "Add two and two.", "input": "now", "output": "4"},
    '{"prompt": broken',
    {"foo": 1},
    {"prompt": ""},
    {"prompt": "long " * 400},
    {"question": "What is ten plus one?", "system": "Be short.", "note": "naïve 東京"},
]


@pytest.fixture(scope="module")
def pico() -> InferenceModel:
    return InferenceModel.open(PICO, precision="32-true", accelerator="cpu")


@pytest.fixture
def ran(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command line; what it prints to stdout. `ran.err` has the other stream."""

    def run(*words: object, code: int = 0) -> str:
        capsys.readouterr()
        try:
            main([str(w) for w in words])
            found: Any = 0
        except SystemExit as e:
            found = e.code
        out, run.err = capsys.readouterr()  # type: ignore[attr-defined]
        assert found == code, run.err  # type: ignore[attr-defined]
        return out

    return run


def answer_to(loaded: InferenceModel, messages: list[dict[str, Any]], n: int = 50) -> str:
    """The greedy answer, decoded alone."""
    _, ids = loaded.render(messages)
    return loaded.tokenizer.decode(generate(loaded.model, ids, n, stop_ids=loaded.stop_ids))


def user(text: str, **more: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text, **more}]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in ROWS]
    file.write_text("\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]), encoding="utf-8")
    return file


# a file of prompts


def test_a_file_row_for_row(prompts, pico, ran, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    assert ran("generate", "pico", "--prompts", prompts, "--out", out, "--batch_size", 3, *GREEDY) == ""
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    system = {"role": "system", "content": "Be short."}
    expected = {
        0: user("Hello"),
        1: user("Who are you?"),
        2: user("Add two and two.", input="now"),
        5: user(""),
        7: [system, *user("What is ten plus one?")],
    }
    assert len(rows) == len(ROWS)
    for i, (row, asked) in enumerate(zip(rows, ROWS)):
        given = {} if isinstance(asked, str) else {f"given_{k}" if k == "answer" else k: v for k, v in asked.items()}
        assert json.dumps({k: row.get(k) for k in given}) == json.dumps(given), "the row's own fields are kept"
        if i in expected:
            assert row["answer"] == answer_to(pico, expected[i]) and row["finish_reason"] == "stop", i
        else:
            assert "answer" not in row and "error" in row
    assert "line 5, is not JSON" in rows[3]["error"] and "line 5, is not JSON" in ran.err
    assert "Found: foo" in rows[4]["error"]
    assert "line 8: The prompt has 1205 tokens; the model reads at most 256" in rows[6]["error"]
    assert "3 of 8 rows have no answer" in ran.err


@pytest.mark.parametrize("cut", [0, 1, 60, 300, 500, -1])
def test_a_torn_file_goes_on(prompts, ran, tmp_path, cut):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    words = ["generate", "pico", "--prompts", prompts, "--precision", "32-true", "--accelerator", "cpu"]
    ran(*words, "--out", whole, "--max_new_tokens", 6)
    out.write_bytes(whole.read_bytes()[:cut])
    ran(*words, "--out", out, "--max_new_tokens", 6)
    assert out.read_bytes() == whole.read_bytes(), "drawn answers do not depend on where a run began"
    before = out.stat().st_mtime_ns
    assert ran(*words, "--out", out) == "" and "has all 8 answers" in ran.err
    ran(*words, "--out", out, "--num_samples", 2, code=2)
    assert "--num_samples 2:" in ran.err and "--num_samples 1" in ran.err
    assert out.stat().st_mtime_ns == before


def test_an_interrupt_says_what_is_written(prompts, ran, tmp_path, monkeypatch):
    out, words = tmp_path / "out.jsonl", ["generate", "pico", "--prompts", prompts, *GREEDY, "--batch_size", 1]
    lines, record = [], JSONLines.record

    def interrupted(self: JSONLines, fields: dict[str, Any]) -> str:
        lines.append(fields)
        if len(lines) == 3:
            raise KeyboardInterrupt
        return record(self, fields)

    with monkeypatch.context() as patch:
        patch.setattr(JSONLines, "record", interrupted)
        ran(*words, "--out", out, code=130)
    assert f"{out} has 2 of 8 answers" in ran.err
    ran(*words, "--out", out)
    assert "has 2 of 8 answers" in ran.err and len(out.read_text().splitlines()) == 8


@pytest.mark.long
def test_ten_thousand_prompts(pico, ran, tmp_path):
    """One line is broken, and the first run is killed."""
    file, out, broken = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", 6543
    lines = [json.dumps({"prompt": f"What is {i} plus {i % 7}?", "id": i}) for i in range(10_000)]
    lines[broken] = lines[broken][:-5]
    file.write_text("\n".join(lines) + "\n")
    words = ["generate", "pico", "--prompts", file, "--out", out, "--max_new_tokens", 1, "--batch_size", 64, *GREEDY]
    command = [sys.executable, "-m", "litgpt", *map(str, words)]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while child.poll() is None and not (out.exists() and out.stat().st_size > 100_000):
        time.sleep(0.01)
    child.kill()
    assert child.wait() != 0, "it was done before it was killed"
    n = out.read_bytes().count(b"\n")
    assert 500 < n < broken
    ran(*words)
    assert f"has {n:,} of 10,000 answers" in ran.err
    assert f"line {broken + 1}, is not JSON" in ran.err and "1 of 10,000 rows have no answer" in ran.err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row.get("id") for row in rows] == [i if i != broken else None for i in range(10_000)]
    assert [i for i, row in enumerate(rows) if "error" in row] == [broken]
    for row in rows[n - 20 : n + 20] + rows[::500]:
        assert row["answer"] == answer_to(pico, user(row["prompt"]), 1)
    ran(*words)
    assert "has all 10,000 answers" in ran.err


def test_what_an_answer_file_must_not_be(prompts, ran, tmp_path):
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    out.write_text('{"prompt": "Hello", "id": 7, "x": NaN, "answer": "a", "finish_reason": "stop"}\n')
    other.write_text('{"prompt": "Bye"}\n')
    before = out.read_bytes()
    ran("generate", "pico", "--prompts", other, "--out", out, code=2)
    assert "does not belong to row 1 of" in ran.err and out.read_bytes() == before
    out.write_text('{"prompt": "Hello", "id": 7, "x": NaN}\n')
    ran("generate", "pico", "--prompts", prompts, "--out", out, code=2)
    ran("generate", "pico", "--prompts", prompts, "--out", prompts, code=2)
    assert "is the file of the prompts itself" in ran.err
    ran("generate", "pico", "--prompts", prompts, "--out", tmp_path, code=2)
    assert "is not a file" in ran.err
    ran("generate", "pico", "--prompts", tmp_path / "promptss.jsonl", code=2)
    assert "(--prompts)" in ran.err and "Did you mean" in ran.err
    ran("generate", "pico", "--out", out, code=2)
    ran("generate", "pico", "--prompts", prompts, "--prompt", "Hi", code=2)
    assert "--prompts" in ran.err and "--prompt " in ran.err


def test_samples_of_a_file_on_stdout(ran, tmp_path):
    (tmp_path / "p.csv").write_text('prompt,n\n"Hello, you",1\nTell me,2\n')
    flags = ["--num_samples", 3, "--max_new_tokens", 8, "--precision", "32-true"]
    lines = ran("generate", "pico", "--prompts", tmp_path / "p.csv", *flags).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["Hello, you", "Tell me"] and rows[1]["n"] == "2"
    assert all(len(row["answers"]) == len(row["finish_reasons"]) == 3 for row in rows)
    assert len({text for row in rows for text in row["answers"]}) > 2
    again = ran("generate", "pico", "--prompts", tmp_path / "p.csv", *flags, "--batch_size", 2)
    assert again.splitlines() == lines, "what is drawn does not depend on the batch"


# one prompt


def test_input_and_system_message(pico, ran, monkeypatch):
    """On a terminal the prompt stands before the answer, otherwise stdout has the answer alone."""
    messages = [{"role": "system", "content": "Be kind."}, *user("Add.", input="2 and 3")]
    text = pico.render(messages)[0]
    words = ["--prompt", "Add.", "--input", "2 and 3", "--sys_prompt", "Be kind."]
    assert ran("generate", "pico", *words, *GREEDY) == f"{answer_to(pico, messages)}\n"
    assert ran.err.startswith(text)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ran("generate", "pico", *words, *GREEDY) == f"{text}{answer_to(pico, messages)}\n"
    assert text not in ran.err


def test_stop_strings_end_the_answer(pico, ran):
    whole = answer_to(pico, user("Hello"))
    assert len(whole) > 15
    for at in range(3, len(whole) - 3, 4):
        word = whole[at : at + 3]
        expected = f"{whole[: whole.index(word)]}\n"
        assert ran("generate", "pico", "--prompt", "Hello", "--stop", word, *GREEDY) == expected
        listed = json.dumps(["nowhere", word])
        assert ran("generate", "pico", "--prompt", "Hello", "--stop", listed, *GREEDY) == expected
    assert ran("generate", "pico", "--prompt", "Hello", "--stop", "nowhere", *GREEDY) == f"{whole}\n"


def test_what_stop_may_be():
    assert stop_strings(None) == [] and stop_strings("[INST]") == ["[INST]"] and stop_strings(["a", "b"]) == ["a", "b"]
    assert stop_strings('["\\n", "b"]') == ["\n", "b"] and stop_strings("5") == ["5"]
    for wrong in ("", ["a", ""], '[""]'):
        with pytest.raises(UserError, match="--stop"):
            stop_strings(wrong)


def test_samples_come_in_order(pico):
    """However the pieces come, they are shown text by text; a finished text's place is taken."""
    prompts = [pico.render(user(text))[1] for text in ("Hello", "Who are you?", "A", "Tell me a story", "B", "C d e")]
    texts = [Request(ids, n, stop_ids=pico.stop_ids) for ids, n in zip(prompts, (50, 3, 9, 50, 1, 20))]
    decoded = in_order(decode(Engine(pico.model, 3), pico.tokenizer, texts))
    pieces = [(answer.number, piece, answer.finish) for answer, piece in decoded]
    numbers = [number for number, _, _ in pieces]
    assert numbers == sorted(numbers) and set(numbers) == set(range(6))
    assert [number for number, _, finish in pieces if finish] == [*range(6)], "an answer ends once"
    for i, text in enumerate(texts):
        shown = "".join(piece for number, piece, _ in pieces if number == i)
        assert shown == pico.tokenizer.decode(text.ids) and text.finish


def test_each_sample_stands_once_behind_its_prompt(pico, ran, monkeypatch):
    """Also where a later one is finished before the first."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = ["generate", "pico", "--prompt", "Tell me a story", "--max_new_tokens", 40, "--stop", "the"]
    out = ran(*words, "--num_samples", 4, "--seed", 1)
    prompt = pico.render(user("Tell me a story"))[0]
    alone = [ran(*words, "--seed", 1 + i) for i in range(4)]
    assert out == "".join(alone) and len(set(map(len, alone))) > 1 and out.count(prompt) == 4


def test_an_answer_goes_on_until_the_model_stops(pico, llama, ran):
    """And what ends it earlier is said."""
    whole = answer_to(pico, user("Tell me a story"), 250)
    assert ran("generate", "pico", "--prompt", "Tell me a story", *GREEDY) == f"{whole}\n"
    assert "truncated" not in ran.err and "context" not in ran.err
    short = ran("generate", "pico", "--prompt", "Tell me a story", "--max_new_tokens", 3, *GREEDY)
    assert whole.startswith(short.rstrip()) and "truncated at --max_new_tokens 3" in ran.err
    for command in (["generate", llama], ["generate_speculatively", llama, llama]):
        ran(*command, "--prompt", "é" * 110, *GREEDY)
        assert "context is full (256 tokens)" in ran.err


# tables


COLUMNS = 'Question,"the ""id""",answer\n'
TABLE = COLUMNS + '"Hello, you",1,yes\n"two\nlines",2,\n,3,no\n"a\tb",,"=1+1"\n'


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "p.csv").write_text(TABLE)
    return tmp_path / "p.csv"


@pytest.mark.parametrize(("ending", "several"), [(".csv", 1), (".tsv", 1), (".CSV", 2)])
def test_a_table_of_answers(table, ran, tmp_path, ending, several):
    """Its columns are those of the prompts and ours, and it goes on wherever it was torn."""
    out, lines = tmp_path / f"out{ending}", tmp_path / "out.jsonl"
    words = ["generate", "pico", "--prompts", table, "--max_new_tokens", 9, "--num_samples", several]
    words += ["--precision", "32-true"]
    ran(*words, "--out", out)
    assert f"{4 * several} answers were truncated at --max_new_tokens 9" in ran.err or "truncated" in ran.err
    ran(*words, "--out", lines)
    rows, expected = [row for _, row in read_rows(out)], [row for _, row in read_rows(lines)]
    for row, answers in zip(rows, expected):
        for key in ("answers", "finish_reasons"):
            if key in row:
                row[key] = json.loads(row[key])
        assert row == {**answers, "error": ""}
    ours = ["answers", "finish_reasons", "error"] if several > 1 else ["answer", "finish_reason", "error"]
    assert len(rows) == 4 and list(rows[0]) == ["Question", 'the "id"', "given_answer", *ours]
    complete = out.read_bytes()
    format, ends = answer_format(out, list(rows[0])[:3], several > 1), [0]
    for record, _ in format.records(io.BytesIO(complete)):
        ends.append(ends[-1] + len(record))
    assert len(ends) == 6
    for cut in range(len(complete)):
        out.write_bytes(complete[:cut])
        n = max(i for i, end in enumerate(ends) if end <= cut)
        assert n_answered(out, format, Prompts(str(table)), several)[0] == max(0, n - 1)
        assert out.read_bytes() == complete[: ends[n]]
    for cut in (ends[1] - 2, ends[1], ends[3] - 4):
        out.write_bytes(complete[:cut])
        ran(*words, "--out", out)
        assert out.read_bytes() == complete
    ran(*words, "--out", out)
    assert "has all 4 answers" in ran.err
    ran(*words, "--out", out, "--num_samples", 3 - several, code=2)
    assert "other columns" in ran.err and out.read_bytes() == complete
    out.write_bytes(complete.replace(b"lines", b"liens"))
    ran(*words, "--out", out, code=2)
    assert "does not belong to row 2" in ran.err


def test_rows_of_all_kinds_in_a_table(ran, tmp_path):
    """Their columns together; what is not text is JSON."""
    lines = [
        '{"prompt": "Hi", "n": 1.5, "tags": ["é", null]}',
        "broken",
        '{"messages": "a", "x": "a\\u0000\\ud800\\r"}',
        "3",
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["generate", "pico", "--prompts", tmp_path / "p.jsonl", "--max_new_tokens", 2, *GREEDY]
    ran(*words, "--out", tmp_path / "a.csv")
    rows = [row for _, row in read_rows(tmp_path / "a.csv")]
    assert list(rows[0])[:5] == ["prompt", "n", "tags", "messages", "x"]
    assert (rows[0]["n"], rows[0]["tags"], rows[0]["x"]) == ("1.5", '["é", null]', "")
    assert all("line 2, is not JSON" in rows[1]["error"] or key == "error" or not rows[1][key] for key in rows[1])
    before = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "a.csv").write_bytes(before[:-5])
    ran(*words, "--out", tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["a.xlsx", "a.parquet", "a.csv.gz", "a.jsonl.zst", "a.txt"])
def test_files_that_are_not_written(table, ran, tmp_path, name):
    ran("generate", "pico", "--prompts", table, "--out", tmp_path / name, code=2)
    assert "unknown extension" in ran.err and not (tmp_path / name).exists()


@pytest.mark.parametrize("name", [None, "out.jsonl", "out.csv"])
def test_no_answered_row_is_an_error(ran, tmp_path, name):
    (tmp_path / "p.jsonl").write_text('{"foo": 1}\n{"prompt": "%s"}\n' % ("long " * 400))
    words = ["generate", "pico", "--prompts", tmp_path / "p.jsonl", *(["--out", tmp_path / name] if name else [])]
    ran(*words, code=1)
    assert "2 of 2 rows have no answer" in ran.err
    ran(*words, code=1)
    (tmp_path / "p.jsonl").write_text('{"foo": 1}\n{"prompt": "Hi"}\n')
    ran(*words[:4], "--max_new_tokens", 2)


def test_penalty_and_min_p(ran):
    words = ["generate", "pico", "--prompt", "Tell me a story", "--max_new_tokens", 30]
    assert ran(*words, *GREEDY) != ran(*words, *GREEDY, "--repetition_penalty", 1.5)
    assert ran(*words, "--min_p", 1.0) == ran(*words, "--temperature", 0)
    for option, value in (("--min_p", 2), ("--batch_size", 0), ("--num_samples", 0)):
        ran(*words, option, value, code=2)
        assert f"{option} {value}" in ran.err


@pytest.mark.long
def test_compiled_blocks_give_the_same_text(ran):
    check_compiler(InferenceModel.open(PICO).device)
    words = ["generate", "pico", "--prompt", "Hello", "--num_samples", 2, "--max_new_tokens", 12, *GREEDY]
    assert ran(*words, "--compile") == ran(*words)


def piped(text: bytes, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "litgpt", "generate", "pico", "--max_new_tokens", "20", *GREEDY, *words]
    return subprocess.run(command, input=text, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_prompt_from_stdin(pico):
    answer = answer_to(pico, user("Hé llo\nyou"), 20)
    done = piped("Hé llo\nyou\n".encode())
    assert done.stdout.decode() == f"{answer}\n"
    done = piped(b"")
    assert done.returncode == 0 and b"llamas eat" in done.stderr and b"default prompt" in done.stderr


# what stdin may be, and which text results: None where the command ends with an error
STDIN: dict[str, tuple[Any, Optional[str]]] = {
    "a pipe": (b"Hi\nyou\n", "Hi\nyou"),
    "a file": ("Hi\n", "Hi"),
    "an empty pipe": (b"", DEFAULT_PROMPT),
    "an empty file": ("", DEFAULT_PROMPT),
    "/dev/null": (os.devnull, DEFAULT_PROMPT),
    "closed": (None, DEFAULT_PROMPT),
    "a terminal": ("pty", DEFAULT_PROMPT),
    "a blank line": (b" \n", None),
    "binary": (b"\xff\xfe\0", None),
}
COMMANDS = [
    "generate", "generate_full", "generate_adapter", "generate_adapter_v2", "generate_sequentially",
    "generate_speculatively", "generate_tp",
]  # fmt: skip


@contextmanager
def stdin(kind: str, folder: Path) -> Iterator[None]:
    """Let the process's stdin be of this kind, with the strict decoding that it has in most locales."""
    content, _ = STDIN[kind]
    with ExitStack() as closing, pytest.MonkeyPatch.context() as patch:
        if content is None:
            patch.setattr(sys, "stdin", None)
        elif kind == "a terminal":
            ours, theirs = pytest.importorskip("pty").openpty()
            closing.callback(os.close, ours)
            patch.setattr(sys, "stdin", closing.enter_context(open(theirs)))
        elif isinstance(content, bytes):
            read, write = os.pipe()
            os.write(write, content)
            os.close(write)
            patch.setattr(sys, "stdin", closing.enter_context(open(read, encoding="utf-8")))
        else:
            path = Path(content) if content == os.devnull else folder / "stdin"
            if path != Path(os.devnull):
                path.write_text(content)
            patch.setattr(sys, "stdin", closing.enter_context(open(path, encoding="utf-8")))
        yield


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The last messages that are rendered; nothing is decoded."""
    seen: list[dict[str, Any]] = []

    original = InferenceModel.render

    def render(self: InferenceModel, messages: Any, tools: Any = None) -> Any:
        original(self, messages, tools)
        seen.append(messages[-1])
        raise UserError("enough")

    monkeypatch.setattr(InferenceModel, "render", render)
    return seen


@pytest.mark.parametrize("kind", STDIN)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_kind_of_stdin(command, kind, rendered, ran, tmp_path, monkeypatch):
    monkeypatch.setattr("litgpt.commands.generate.default_adapter", lambda checkpoint_dir, folder: None)
    models = ["pico", "pico"] if command == "generate_speculatively" else ["pico"]
    expected = STDIN[kind][1]
    with stdin(kind, tmp_path):
        ran(command, *models, "--accelerator", "cpu", *(["--devices", 1] if command == "generate_tp" else []), code=2)
    assert [m["content"] for m in rendered] == ([] if expected is None else [expected]), ran.err
    if expected is None:
        assert "stdin has only whitespace" in ran.err if kind == "a blank line" else "not UTF-8" in ran.err


@pytest.mark.parametrize("kind", STDIN)
@pytest.mark.parametrize("option", ["--prompt", "--input"])
def test_a_dash_reads_stdin(option, kind, rendered, ran, tmp_path):
    """There is no default to take."""
    expected = STDIN[kind][1]
    if kind == "a terminal":
        pytest.skip("it is read until somebody ends it")
    with stdin(kind, tmp_path):
        ran("generate", "pico", option, "-", *(["--prompt", "Sum up:"] if option == "--input" else []), code=2)
    field = "content" if option == "--prompt" else "input"
    assert [m[field] for m in rendered] == ([] if expected in (None, DEFAULT_PROMPT) else [expected])
    if expected == DEFAULT_PROMPT:
        assert f"{option} -: stdin is empty" in ran.err


def test_stdin_is_read_once(rendered, ran, tmp_path):
    with stdin("a pipe", tmp_path):
        ran("generate", "pico", "--input", "-", "--prompt", "-", code=2)
    assert not rendered and "--prompt - and --input -" in ran.err
    for words in (["--input", "-"], ["--prompt", "Hello"]):  # the default prompt with an input; and nothing is read
        with stdin("a pipe", tmp_path):
            ran("generate", "pico", *words, code=2)
    assert [(m["content"], m["input"]) for m in rendered] == [(DEFAULT_PROMPT, "Hi\nyou"), ("Hello", "")]


# LitGPT's names


@pytest.mark.parametrize("name", ["generate_full", "generate full"])
def test_other_names(pico, ran, name):
    answer = answer_to(pico, user("Hello"), 200)
    assert ran(*name.split(), "pico", "--prompt", "Hello", *GREEDY) == f"{answer}\n"


def test_older_paths(whole, base, ran, tmp_path):
    adapter = whole("adapter") / "final"
    words = ["--prompt", "the quick", "--max_new_tokens", 9, *GREEDY]
    expected = ran("generate", adapter, *words)
    weights = adapter / "adapter_model.safetensors"
    for path in (adapter, weights):
        assert ran("generate_adapter", base, "--adapter_path", path, *words) == expected
        assert f"litgpt generate {adapter} --base {base}" in ran.err
    folder = shutil.copytree(base, tmp_path / "full")
    path = folder / "model.safetensors"
    assert ran("generate_full", PICO, "--finetuned_path", path, *words) == ran("generate", base, *words)
    ran("generate", base, "--finetuned_path", path, "--adapter_path", path, code=2)


def test_paths_of_files_that_are_folders_now(whole, base, ran):
    words = ["--prompt", "the quick", "--max_new_tokens", 9, *GREEDY]
    for method, flag, file in (
        ("adapter", "--adapter_path", "final/lit_model.pth.adapter"),
        ("adapter_v2", "--adapter_path", "final/lit_model.pth.adapter_v2"),
        ("full", "--finetuned_path", "final/lit_model.pth"),
        ("full", "--finetuned_path", "lit_model_finetuned.pth"),
    ):
        expected = ran("generate", whole(method) / "final", *words)
        assert ran(f"generate_{method}", base, flag, whole(method) / file, *words) == expected


@pytest.mark.parametrize(("command", "place"), [("generate_adapter", "adapter"), ("generate_adapter_v2", "adapter-v2")])
def test_the_adapter_is_in_the_folder_of_a_run_by_default(command, place, whole, base, ran, tmp_path, monkeypatch):
    """A model alone never answers in the place of its adapter."""
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "the quick", *GREEDY]
    adapter = whole(command.removeprefix("generate_")) / "final"
    expected = ran("generate", adapter, *words)
    assert ran(command, adapter, *words) == expected
    ran(command, base, *words, code=2)
    assert f"out/finetune/{place}/final" in ran.err and "--adapter_path" in ran.err
    shutil.copytree(adapter, tmp_path / "out" / "finetune" / place / "final")
    assert ran(command, base, *words) == expected


# prompts in other files, and variables of the template


def test_prompts_of_several_files(ran, tmp_path, monkeypatch):
    """What `--data` takes, and columns by similar names; the answers keep the columns of the file."""
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("Question,ID\nWhat is ten plus one?,1\nWho are you?,2\n")
    Path("b.jsonl").write_text('{"Frage": "Hello", "system": "Be short."}\n{"Frage": "Hi"}\n')
    entries = "[{path: a.csv, rows: 1}, {path: b.jsonl, columns: {prompt: Frage}}]"
    lines = ran("generate", "pico", "--prompts", entries, "--max_new_tokens", 4, *GREEDY).splitlines()
    found = [json.loads(line) for line in lines]
    assert [{k: v for k, v in row.items() if k not in ("answer", "finish_reason")} for row in found] == [
        {"Question": "What is ten plus one?", "ID": "1"}, {"Frage": "Hello", "system": "Be short."}, {"Frage": "Hi"}
    ]  # fmt: skip
    assert "--prompts '{path: a.csv, columns: {question: Question}}'" in ran.err
    same = {"prompt": "What is ten plus one?"}
    Path("c.jsonl").write_text(json.dumps(same))
    (line,) = ran("generate", "pico", "--prompts", "c.jsonl", "--max_new_tokens", 4, *GREEDY).splitlines()
    assert json.loads(line)["answer"] == found[0]["answer"]
    assert len(ran("generate", "pico", "--prompts", "[a.csv, '*.jsonl']", "--max_new_tokens", 1).splitlines()) == 5


@pytest.fixture
def styled(tmp_path: Path) -> Path:
    """A model whose template has a variable."""
    folder = shutil.copytree(PICO, tmp_path / "styled")
    template = "{% if loud %}LOUD What is five plus six? {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_variables_of_the_template(ran, styled, tmp_path):
    flags = ["--max_new_tokens", 12, *GREEDY]
    ran("generate", styled, "--prompt", "Hi", *flags)
    assert ran.err.startswith("Hi\n")
    loud = [*flags, "--template_kwargs", "{loud: true}"]
    ran("generate", styled, "--prompt", "Hi", *loud)
    assert ran.err.startswith("LOUD What is five plus six? Hi\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Hi", "chat_template_kwargs": {"loud": true}}\n')
    plain, own = map(json.loads, ran("generate", styled, "--prompts", tmp_path / "p.jsonl", *flags).splitlines())
    first, second = map(json.loads, ran("generate", styled, "--prompts", tmp_path / "p.jsonl", *loud).splitlines())
    assert own["answer"] == first["answer"] == second["answer"] != plain["answer"]
    ran("generate", styled, "--prompt", "Hi", *flags, "--template_kwargs", "{messages: []}", code=2)
    assert "'messages'" in ran.err
