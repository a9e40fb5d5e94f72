"""Data sets and prompt styles from Python, where LitGPT has nothing to compare with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning import LightningDataModule

import litgpt
import litgpt.data
from litgpt import LLM, PromptStyle, prompts
from litgpt.checkpoint.hub import PICO
from litgpt.cli.schema import class_path, load_class
from litgpt.data import data_module, json_file, named
from litgpt.errors import UserError
from litgpt.text.prompts import checkpoint_template
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import make_rows


class Question(PromptStyle):
    def apply(self, prompt, **row):
        return f"Q: {prompt}\nA: "


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def ready(data):
    data.connect(Tokenizer(PICO), batch_size=2, max_seq_length=256)
    data.prepare_data()
    data.setup()
    return data


def texts(data, part="train"):
    dataset = getattr(data, f"{part}_dataset")
    return sorted(dataset.tokenizer.decode(sample["input_ids"].tolist()) for sample in dataset)


def test_public_and_inner_classes():
    for name in litgpt.data.MODULES:
        public = getattr(litgpt.data, name)
        assert issubclass(public, LightningDataModule) and issubclass(public, litgpt.data.inner_class(name))
        assert issubclass(public, litgpt.data.DataModule)
        with litgpt.data.inner_classes():
            assert getattr(litgpt.data, name) is litgpt.data.inner_class(name)
        assert load_class("data", class_path("data", name)) is litgpt.data.inner_class(name)
    assert litgpt.data.JSON is not json_file.JSON and issubclass(litgpt.data.DataModule, data_module.DataModule)
    with pytest.raises(AttributeError, match="NoSuchSet"):
        litgpt.data.NoSuchSet  # noqa: B018


def test_litgpt_modules():
    from litgpt.data.alpaca import Alpaca
    from litgpt.data.json_data import JSON
    from litgpt.data.lit_data import LitData

    assert (Alpaca, JSON, LitData) == (litgpt.data.Alpaca, litgpt.data.JSON, litgpt.data.LitData)


@pytest.mark.parametrize(("name", "path"), [("own_rows.Mine", "own_rows.Mine"), ("JSON", "litgpt.data.JSON")])
def test_the_command_line_needs_no_lightning(name, path, tmp_path, llama, rows_file, monkeypatch):
    """Not for a class of one's own either. The path of the class is recorded."""
    (tmp_path / "own_rows.py").write_text(
        "import sys\nfrom litgpt.data import JSON\n\n\nclass Mine(JSON):\n    def adapt(self, fields):\n"
        "        return {'prompt': 'fox', 'completion': fields['output']}\n"
    )
    code = (
        "import sys\nfrom litgpt.__main__ import main\ncode = main()\n"
        "print('LIGHTNING', 'lightning' in sys.modules, code)"
    )
    words = ["finetune", "lora", llama, "--data", name, "--data.json_path", rows_file, "--train.max_steps", "1"]
    words += ["--out_dir", tmp_path / "out", "--accelerator", "cpu", "--precision", "32-true"]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(litgpt.__file__).parent.parent}")
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert "LIGHTNING False" in done.stdout, done.stderr
    recorded = yaml.safe_load((tmp_path / "out" / "final" / "hyperparameters.yaml").read_text())
    assert recorded["data"]["class_path"] == path


def test_other_formats(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]
    file = write(tmp_path / "rows.jsonl", rows)
    data = ready(litgpt.data.JSON(file, val_split_fraction=0.25, num_workers=0, prompt_style=Question()))
    assert texts(data)[0].startswith("Q: q") and len(texts(data, "test")) == 1
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "v"},
    ]
    file = write(tmp_path / "chat.json", [{"messages": messages}] * 3)
    data = ready(litgpt.data.JSON(file, prompt_style="qwen3", num_workers=0))
    assert "system\ns" in texts(data)[0] and "user\nu" in texts(data)[0] and texts(data)[0].endswith("v")


def test_rows_that_cannot_be_used(tmp_path):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    for row in ({"messages": turns}, {"text": "only a text"}):
        with pytest.raises(UserError, match="litgpt finetune"):
            ready(litgpt.data.JSON(write(tmp_path / "rows.json", [row]), num_workers=0))
    data = ready(litgpt.data.JSON(write(tmp_path / "r.json", [{"messages": turns}]), num_workers=0, on_bad_row="skip"))
    assert len(data.train_dataset) == 0
    with pytest.raises(UserError, match="connect"):
        litgpt.data.JSON(tmp_path / "r.json").train_dataloader()


@pytest.mark.parametrize("several", [False, True])
def test_conversations(tmp_path, several):
    write(tmp_path / "train.jsonl", [{"conversations": ["a", "b", "c", "d"]}, {"conversations": ["e", "f"]}])
    options = {"include_multiturn_conversations": several, "num_workers": 0}
    data = litgpt.data.LIMA(prompt_style=Question(), val_split_fraction=0.0, download_dir=tmp_path, **options)
    expected = ["Q: a\nA: b", *(["Q: c\nA: d"] if several else []), "Q: e\nA: f"]
    assert texts(ready(data)) == expected
    messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, "abcd")]
    for split in ("train_sft", "test_sft"):
        write(tmp_path / f"{split}.jsonl", [{"messages": messages, "prompt": "a"}])
    data = ready(litgpt.data.Deita(prompt_style=Question(), download_dir=tmp_path, **options))
    assert texts(data) == texts(data, "test") == expected[: 1 + several]


def test_dolly(tmp_path):
    row = {"instruction": "i", "context": "c", "response": "r", "category": "k"}
    write(tmp_path / "databricks-dolly-15k.jsonl", [row] * 4)
    data = ready(litgpt.data.Dolly(download_dir=tmp_path, num_workers=0))
    assert "### Input:\nc\n\n### Response:\nr" in texts(data)[0] and isinstance(data, named.Dolly)


def test_tiny_stories(tmp_path):
    folder = tmp_path / "TinyStories_all_data"
    folder.mkdir()
    for i in range(2):
        write(folder / f"data0{i}.json", [{"story": f"Once {i} upon a time."}] * 20)
    data = litgpt.data.TinyStories(tmp_path, num_workers=0)
    data.connect(Tokenizer(PICO), batch_size=2, max_seq_length=8)
    data.setup()
    assert next(iter(data.train_dataloader())).shape == (2, 9)
    with pytest.raises(UserError, match="a block has 5000"):
        data.connect(Tokenizer(PICO), max_seq_length=4999)
        data.setup()


def test_a_checkpoints_chat_template():
    """The template writes BOS and the stop token, which are not doubled."""
    style, tokenizer = checkpoint_template(PICO), Tokenizer(PICO)
    rows = [{"instruction": "Add 1 and 2.", "output": "3"}]
    sample = litgpt.data.SFTDataset(rows, tokenizer, style)[0]
    text = tokenizer.decode(sample["input_ids"].tolist(), skip_special=False)
    conversation = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]
    assert text == style.render_row(conversation).text[: len(text)] and text.count(tokenizer.bos_token) == 1
    labels = sample["labels"][sample["labels"] != -100].tolist()
    assert tokenizer.decode(labels, skip_special=False) in ("3<|end|>", "3</s>")


def test_a_style_object_in_our_loop(tmp_path, llama):
    """The tokens of a style are made anew when its class changes."""
    file = write(tmp_path / "rows.json", make_rows(20))
    data = litgpt.data.JSON(file, prompt_style=Question(), mask_prompt=True)
    loaded = data.load(Tokenizer(llama), llama, 256)
    assert Tokenizer(llama).decode(loaded.train.row(0)[0].tolist()).startswith("Q: ")
    again = litgpt.data.JSON(file, prompt_style=Question(), mask_prompt=True)
    assert again.load(Tokenizer(llama), llama, 256).cached
    changed = type("Question", (PromptStyle,), {"apply": lambda self, prompt, **row: "?"})
    other = litgpt.data.JSON(file, prompt_style=changed(), mask_prompt=True)
    assert not other.load(Tokenizer(llama), llama, 256).cached


def test_a_style_with_apply_only(tmp_path):
    style = Question()
    assert style.name == "Question" and style.single_turn
    assert style.prompt([{"role": "user", "content": "a"}]) == "Q: a\nA: "
    for messages in ([{"role": "user", "content": "a"}] * 3, [{"role": "assistant", "content": "a"}]):
        with pytest.raises(UserError, match="only apply"):
            style.prompt(messages)
    llm = LLM.load("pico")
    llm.prompt_style = style
    llm.save(tmp_path / "out")
    assert isinstance(LLM.load(tmp_path / "out").prompt_style, Question)
    path = tmp_path / "out" / "prompt_style.yaml"
    path.write_text("class_path: not_imported.Style\n")
    with pytest.raises(UserError, match="Import not_imported first"):
        LLM.load(tmp_path / "out")


def test_a_stop_of_several_tokens():
    class Several(Question):
        def stop_tokens(self, tokenizer):
            return ([tokenizer.eos_id], [1, 2])

    llm = LLM.load("pico")
    llm.prompt_style = Several()
    with pytest.raises(UserError, match="several tokens"):
        llm.generate("fox")


def test_chatml_keeps_its_system_message(tmp_path):
    prompts.save_prompt_style(prompts.ChatML("You are a fox."), tmp_path)
    assert prompts.load_prompt_style(tmp_path).system_message == "You are a fox."
    prompts.save_prompt_style(prompts.ChatML(), tmp_path)
    assert prompts.load_prompt_style(tmp_path).system_message is None
    prompts.save_prompt_style(checkpoint_template(PICO), tmp_path)
    assert prompts.load_prompt_style(tmp_path) == checkpoint_template(PICO)
    (tmp_path / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpacca\n")
    with pytest.raises(UserError, match="Did you mean 'Alpaca'"):
        prompts.load_prompt_style(tmp_path)


def test_without_litdata(monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    for name in ("LitData", "OpenWebText", "TinyLlama", "MicroLlama"):
        with pytest.raises(UserError, match=r"pip install '\.\[litdata"):
            getattr(litgpt.data, name)()


def test_batches_fit_a_loop():
    data = litgpt.data.PicoSums(num_workers=0)
    ready(data)
    batch = next(iter(data.train_dataloader()))
    _, loss = LLM.load("pico", distribute=None)(batch["input_ids"], batch["labels"])
    assert torch.isfinite(loss)
