"""What was trained goes with the result: other programs render the same prompts and stop at the same token."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from litgpt.__main__ import main
from litgpt.data.json_file import JSON
from litgpt.text.prompts import STYLE_FILE, chat_templates, checkpoint_template, choose_style, load_style, save_style
from litgpt.text.styles import STYLES, NamedStyle
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import make_rows, save_llama

MY_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}" + (
    "{% if add_generation_prompt %}assistant>{% endif %}"
)
BASE_TEMPLATE = "{% for m in messages %}BASE {{ m.content }}{{ eos_token }}{% endfor %}"


def add_token(folder: Path, token: str) -> None:
    """Give a tiny model's tokenizer a special token in the place of one of its tokens, so that the sizes stay."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    old = next(text for text, i in fields["model"]["vocab"].items() if i == 299)
    fields["model"]["vocab"][token] = fields["model"]["vocab"].pop(old)
    fields["model"]["merges"] = [m for m in fields["model"]["merges"] if "".join(m) != old]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    fields["added_tokens"].append({"id": 299, "content": token, **flags, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def bases(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models that stop at `</s>` by themselves: without a template, with one as a file, and with one in
    `tokenizer_config.json` and another one for tools."""
    made = {}
    for name in ("none", "file", "config"):
        made[name] = save_llama(tmp_path_factory.mktemp("bases") / name, tokenizer_file)
        add_token(made[name], "<|im_end|>")
    (made["file"] / "chat_template.jinja").write_text(BASE_TEMPLATE)
    config = json.loads((made["config"] / "tokenizer_config.json").read_text())
    listed = [{"name": name, "template": BASE_TEMPLATE} for name in ("default", "tool_use")]
    (made["config"] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": listed}))
    return made


def turns(*texts: str, system: str = "") -> list[dict[str, Any]]:
    said: list[dict] = [{"role": "system", "content": system}] if system else []
    return said + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("name", STYLES)
def test_named_styles_as_templates(name, bases, tmp_path):
    """`transformers` renders the prompts and the trained rows as we do, from the files alone."""
    style, folder = STYLES[name], tmp_path / "m"
    assert isinstance(style, NamedStyle)
    shutil.copytree(bases["config"], folder)
    ours = Tokenizer(folder)
    save_style(style, folder, ours.prefix, ours.eos_token)
    theirs = AutoTokenizer.from_pretrained(folder)

    def rendered(messages: list[dict], answered: bool = False) -> list[int]:
        return theirs.apply_chat_template(messages, add_generation_prompt=not answered, return_dict=False)

    asked = [turns("Say {input} 'x'\n"), [{**turns("Name it.")[0], "input": 'red "fox"'}]]
    if "{system}" in style.text:
        asked.append(turns("q", system="Be {prompt}."))
    if style.close is not None:
        asked.append(turns("q", "a", "q", "a", "r"))
    for messages in asked:
        assert rendered(messages) == ours.encode(style.prompt(messages))
    if style.close is None:  # as in `litgpt chat`
        assert rendered(turns("q", "a", "q", "a", "r")) == ours.encode(style.prompt(turns("r")))
    if "{system}" not in style.text:
        with pytest.raises(Exception, match="does not show"):
            rendered(turns("q", system="s"))
    with pytest.raises(Exception, match="does not show"):
        theirs.apply_chat_template(turns("q"), tools=[{"type": "function", "function": {"name": "f"}}])
    row = turns("q", "a", "r", "b") if style.close is not None else turns("q", "b")
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": row}]))
    loaded = JSON(str(tmp_path / "rows.json"), val_split_fraction=0, prompt_style=name).load(ours, folder, 4096)
    assert rendered(row, answered=True) == loaded.train.row(0)[0].tolist()


def finetune(method: str, base: Path, out: Path, rows: Path, *words: str) -> Path:
    main(
        f"finetune {method} {base} --data JSON --data.json_path {rows} --out_dir {out} --accelerator cpu "
        "--precision 32-true --train.max_steps 1 --train.lr_warmup_steps 0 --eval.initial_validation false "
        "--eval.final_validation false --eval.max_new_tokens null --train.micro_batch_size 4".split()
        + list(words)
    )
    return out / "final"


WAYS = {"alpaca": "alpaca", "chatml": "chatml", "file": "{folder}/mine.jinja", "phi-3": "phi-3"}
STOPS = {"chatml": 299, "file": 299}


@pytest.mark.parametrize("base", ["none", "file", "config"])
@pytest.mark.parametrize(
    ("method", "way"), [("lora", "alpaca"), ("lora", "chatml"), ("lora", "file"), ("full", "file")]
)
def test_the_style_of_a_run_is_that_of_its_result(method, way, base, bases, rows_file, tmp_path):
    (tmp_path / "mine.jinja").write_text(MY_TEMPLATE)
    chosen = WAYS[way].format(folder=tmp_path)
    final = finetune(method, bases[base], tmp_path / "out", rows_file, "--data.prompt_style", chosen)
    style = choose_style(chosen, bases[base])
    assert load_style(final) == style
    folders = [final]
    if method == "lora":
        main(["merge_lora", str(final)])
        folders.append(tmp_path / "out" / "final-merged")
    for folder in folders:
        ours, theirs = Tokenizer(folder, bases[base]), AutoTokenizer.from_pretrained(folder)
        expected = ours.encode(style.prompt(turns("q")), special=not style.own_special_tokens)
        assert theirs.apply_chat_template(turns("q"), add_generation_prompt=True, return_dict=False) == expected
        stops = GenerationConfig.from_pretrained(folder).eos_token_id
        assert STOPS.get(way, 1) in (stops if isinstance(stops, list) else [stops])
        assert ours.stop_ids >= {STOPS.get(way, 1)}
        written = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        assert {"default": written} == chat_templates(folder), "in both places, and no other template beside it"


def test_the_models_own_template_stays_as_it_is(bases, rows_file, tmp_path):
    final = finetune("lora", bases["config"], tmp_path / "out", rows_file)
    assert chat_templates(final) == chat_templates(bases["config"])
    assert (final / "tokenizer_config.json").read_bytes() == (bases["config"] / "tokenizer_config.json").read_bytes()
    assert load_style(final) == checkpoint_template(bases["config"])


def test_plain_texts_teach_no_style(bases, tmp_path):
    """The model's own template goes on to hold; where there is none, none is made up."""
    (tmp_path / "texts.json").write_text(json.dumps([{"text": row["output"]} for row in make_rows(8)]))
    for base, n in (("file", 1), ("none", 0)):
        final = finetune("lora", bases[base], tmp_path / base, tmp_path / "texts.json")
        assert len(chat_templates(final)) == n and not (final / STYLE_FILE).exists()


@pytest.mark.parametrize("way", ["alpaca", "chatml", "file"])
def test_a_result_is_finetuned_again_in_its_style(way, bases, rows_file, tmp_path):
    (tmp_path / "mine.jinja").write_text(MY_TEMPLATE)
    chosen = WAYS[way].format(folder=tmp_path)
    first = finetune("full", bases["none"], tmp_path / "a", rows_file, "--data.prompt_style", chosen)
    second = finetune("lora", first, tmp_path / "b", rows_file)
    assert load_style(second) == load_style(first) == choose_style(chosen, bases["none"])
    third = finetune("lora", first, tmp_path / "c", rows_file, "--data.prompt_style", "none")
    assert load_style(third).name == "none", "what is asked for wins"
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([{"text": row["output"]} for row in make_rows(8)]))
    assert load_style(finetune("lora", first, tmp_path / "d", texts)) == load_style(first)


@pytest.mark.parametrize("base", ["none", "file", "config"])
@pytest.mark.parametrize("own", ["file", "config", "config with tools"])
def test_a_merge_takes_the_template_of_the_adapter(own, base, bases, rows_file, tmp_path):
    """Whatever files the two folders have it in. An adapter of `peft` has no prompt_style.yaml."""
    adapter = finetune("lora", bases[base], tmp_path / "out", rows_file, "--data.prompt_style", "none")
    (adapter / STYLE_FILE).unlink()
    (adapter / "chat_template.jinja").unlink()
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    expected = {"default": MY_TEMPLATE}
    if own == "file":
        (adapter / "chat_template.jinja").write_text(MY_TEMPLATE)
    else:
        expected |= {"tool_use": "tools" + MY_TEMPLATE} if own == "config with tools" else {}
        listed = [{"name": name, "template": template} for name, template in expected.items()]
        config["chat_template"] = listed if len(listed) > 1 else MY_TEMPLATE
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    main(["merge_lora", str(adapter), "--out_dir", str(tmp_path / "merged")])
    assert chat_templates(tmp_path / "merged") == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert (theirs if isinstance(theirs, dict) else {"default": theirs}) == expected
