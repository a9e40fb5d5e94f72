"""A tokenizer may have more tokens than the model has embeddings; a text that uses such a token is refused by name."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from lm_eval.api.instance import Instance

from litgpt import LLM
from litgpt.__main__ import main
from litgpt.data.documents import TextFiles
from litgpt.data.json_file import JSON
from litgpt.errors import UserError
from litgpt.evaluation.lm import LitGPT
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.reference_outputs import make_reference_outputs
from litgpt.methods.lora import LoRA
from litgpt.text.prompts import load_style
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import make_rows
from tests.runs import words
from tests.servers import in_thread
from tests.test_lora import save, with_lora

BEYOND = "<tool>"
REFUSED = rf"'{BEYOND}' \(id 300\).*only 300 embeddings"


def add_token(folder: Path) -> Path:
    """Give a folder's tokenizer of 300 tokens another one."""
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    token = {"id": 300, "content": BEYOND, "special": True, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    fields["added_tokens"].append(token | flags)
    file.write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 embeddings and a tokenizer of 301 tokens."""
    return add_token(shutil.copytree(llama, tmp_path_factory.mktemp("m") / "model"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What a command says that ends with 2, in one line."""

    def run(*args: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert stop.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert BEYOND in line and "id 300" in line and "only 300 embeddings" in line
        return line

    return run


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROWS: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": f"a {BEYOND}", "output": "b"},
    "output": {"instruction": "a", "output": f"b {BEYOND} c"},
    "input": {"instruction": "a", "input": BEYOND, "output": "b"},
    "messages": {"messages": [said("system", BEYOND), said("user", "a"), said("assistant", "b")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": BEYOND}]},
    "history": {"instruction": "a", "output": "b", "history": [[BEYOND, "c"]]},
    "prompt_completion": {"prompt": "a", "completion": BEYOND},
    "question_answer": {"question": "a", "answer": BEYOND},
    "preference": {"prompt": "a", "chosen": BEYOND, "rejected": "c"},
    "label": {"prompt": "a", "completion": BEYOND, "label": True},
    "text": {"text": f"once {BEYOND}"},
}


def good(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(row).replace(BEYOND, "d"))


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("where", ["train", "val"])
def test_rows(form, where, folder, tmp_path, refused, capsys):
    """Of every form, in the file of the training rows and in that of the validation rows."""
    file, other = tmp_path / "bad.json", tmp_path / "good.json"
    file.write_text(json.dumps([good(ROWS[form]), ROWS[form], good(ROWS[form])]))
    other.write_text(json.dumps([good(ROWS[form])] * 3))
    train, val = (file, other) if where == "train" else (other, file)
    data = ["--data", "JSON", "--data.json_path", train, "--data.val_path", val]
    line = refused("finetune", "lora", folder, *data, "--out_dir", tmp_path / "out")
    args = ["data", "check", folder, *data]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    report = capsys.readouterr().out
    assert stop.value.code == 1 and BEYOND in report and "only 300 embeddings" in report
    for text in (line, report):
        assert "bad.json" in text and "row 2 (index 1)" in text and "--data.on_bad_row skip" in text
    with pytest.raises(SystemExit):  # the same rows are in both files
        main([*map(str, args), "--data.on_bad_row", "skip", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["counts" if where == "train" else "val_counts"]["bad"] == 1
    assert found[where]["rows"] == 2


def test_what_is_cut_off_does_no_harm(folder, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "a b c d e f g h " + BEYOND}] * 3))
    tokenizer = Tokenizer(folder, n_embeddings=300)
    data = JSON(json_path=file, val_split_fraction=0)
    assert data.load(tokenizer, folder, 6).counts.bad == 0
    with pytest.raises(UserError, match=REFUSED):
        data.load(tokenizer, folder, 60)


def test_documents_that_are_skipped(folder, tmp_path):
    for name, text in (("a.txt", "once upon a time " * 20), ("b.txt", f"once {BEYOND} " * 20)):
        (tmp_path / name).write_text(text)
    tokenizer = Tokenizer(folder, n_embeddings=300)
    with pytest.raises(UserError, match=r"b\.txt.*" + REFUSED):
        TextFiles(str(tmp_path)).load(tokenizer, folder, 30)
    loaded = TextFiles(str(tmp_path), on_bad_row="skip").load(tokenizer, folder, 30)
    assert loaded.counts.bad == 1 and loaded.counts.rows == 2 and max(loaded.train.row(0)[0]) < 300


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_training(command, folder, tmp_path, refused):
    text, rows = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(f"once upon a time {BEYOND} " * 20)
    rows.write_text(json.dumps([*make_rows(20), ROWS["output"]]))
    if command == "finetune":
        line = refused(*words("lora", folder, rows, tmp_path / "out"))
    else:
        data = ["--data", "TextFiles", "--data.train_data_path", text]
        out = ["--out_dir", tmp_path / "out", "--train.max_tokens", 1000]
        line = refused("pretrain", "--initial_checkpoint_dir", folder, *data, *out)
    assert ("text.txt" if command == "pretrain" else "rows.json") in line
    assert not (tmp_path / "out" / "final").exists()


def test_validate_notes_it(folder, capsys):
    main(["validate", str(folder)])
    out = capsys.readouterr().out
    assert "note" in out and "complete and usable" in out


def test_a_smaller_tokenizer_is_as_good(tmp_path, llama, tokenizer_file, capsys):
    from tests.conftest import save_llama

    main(["validate", str(save_llama(tmp_path / "model", tokenizer_file, vocab_size=320))])
    assert "note" not in capsys.readouterr().out


def test_generate(folder, tmp_path, refused, capsys):
    refused("generate", folder, "--prompt", f"a {BEYOND}")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in ("a", BEYOND, "b")))
    main(["generate", str(folder), "--prompts", str(prompts), "--out", str(out), "--max_new_tokens", "3"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in line for line in lines] == [False, True, False] and BEYOND in lines[1]["error"]


def test_an_adapter_with_more_tokens_than_its_base(llama, tmp_path, refused):
    lora = LoRA(r=2)
    adapter = add_token(save(with_lora(llama, lora), lora, llama, tmp_path / "adapter"))
    refused("generate", adapter, "--prompt", BEYOND)


def test_chat(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n{BEYOND}\nhello\n"))
    main(["chat", str(folder), "--max_new_tokens", "3", "--accelerator", "cpu"])
    out, err = capsys.readouterr()
    assert BEYOND in err and "id 300" in err and out.count("\n") >= 2


def test_serve(folder):
    with in_thread(folder) as running:
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", {"messages": [said("user", BEYOND)]}),
            ("/v1/completions", {"prompt": BEYOND}),
            ("/v1/completions", {"prompt": ["a", f"b{BEYOND}"]}),
            ("/v1/completions", {"prompt": [5, 300]}),
            ("/predict", {"prompt": BEYOND}),
        ]
        for path, body in bodies:
            answer = httpx.post(running.url + path, json={"max_tokens": 2, **body})
            assert answer.status_code == 400 and BEYOND in answer.text and "id 300" in answer.text
            assert "context_length" not in answer.text
        assert httpx.post(running.url + "/predict", json={"prompt": "a"}).status_code == 200


def test_python(folder):
    llm = LLM.load(folder)
    for ask in (
        lambda: llm.generate(BEYOND, max_new_tokens=2),
        lambda: llm.generate(["a", BEYOND], max_new_tokens=2),
        lambda: llm.chat([said("user", BEYOND)], max_new_tokens=2),
    ):
        with pytest.raises(UserError, match=REFUSED):
            ask()
    with pytest.raises(UserError, match=REFUSED):
        llm.tokenizer.encode(f"a {BEYOND}")


def instance(kind: Any, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("loglikelihood", (BEYOND, " a")),
        ("loglikelihood", ("a", BEYOND)),
        ("loglikelihood", ("", BEYOND)),
        ("loglikelihood_rolling", (f"a {BEYOND} b",)),
        ("generate_until", (f"a {BEYOND}", {"until": ["."], "max_gen_toks": 3})),
    ],
)
def test_evaluate(kind, args, folder):
    model = LitGPT(InferenceModel.open(folder, accelerator="cpu"))
    with pytest.raises(UserError, match=REFUSED):
        getattr(model, kind)([instance(kind, *args)])


def test_the_template_uses_one(folder, tmp_path):
    """Then no conversation can be rendered, and there are no reference outputs either."""
    copy = shutil.copytree(folder, tmp_path / "model")
    fields = json.loads((copy / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}" + BEYOND + "{{ m.content }}{% endfor %}"
    (copy / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": template}))
    loaded = InferenceModel.open(copy, accelerator="cpu")
    with pytest.raises(UserError, match=REFUSED):
        loaded.render([said("user", "a")])
    with pytest.raises(UserError, match=REFUSED):
        make_reference_outputs(loaded.model, loaded.tokenizer, load_style(copy), ["F32"])


def test_an_end_of_text_beyond_the_embedding(folder, tmp_path, refused):
    """What is put behind each row is a token of the text, too."""
    copy = shutil.copytree(folder, tmp_path / "model")
    fields = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(fields | {"eos_token": BEYOND}))
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(4)))
    words = ["finetune", "lora", copy, tmp_path / "rows.json", "--out_dir", tmp_path / "out"]
    assert "row 1 (index 0)" in refused(*words)
