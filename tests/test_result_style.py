"""What was trained goes with the result: other programs render the same prompts and stop at the same token."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from litgpt import LLM
from litgpt.__main__ import main
from litgpt.data.json_file import JSON
from litgpt.text.prompt_style import PromptStyle
from litgpt.text.prompts import (
    STYLE_FILE,
    chat_templates,
    checkpoint_template,
    choose_style,
    jinja_templates,
    load_style,
    save_style,
    save_template,
)
from litgpt.text.styles import STYLES, NamedStyle
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import make_rows, save_llama, some

MY_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}" + (
    "{% if add_generation_prompt %}assistant>{% endif %}"
)
BASE_TEMPLATE = "{% for m in messages %}BASE {{ m.content }}{{ eos_token }}{% endfor %}"
BASES = ("none", "file", "more", "config", "both", "legacy")


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
    """Tiny models that stop at `</s>` by themselves: without a template, with one as a file, with others beside it,
    with one in `tokenizer_config.json` and another one for tools, with one in each file that may have one, and with one
    in the file that only processors of images read."""
    made = {}
    for name in BASES:
        folder = tmp_path_factory.mktemp("bases") / name
        made[name] = save_llama(folder, tokenizer_file, max_position_embeddings=4096)
        add_token(folder, "<|im_end|>")
        if name in ("file", "more", "both"):
            (folder / "chat_template.jinja").write_text(BASE_TEMPLATE)
        if name in ("legacy", "both"):
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": BASE_TEMPLATE}))
    (made["none"] / "generation_config.json").unlink()
    (made["more"] / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (made["more"] / "additional_chat_templates" / f"{name}.jinja").write_text(name + BASE_TEMPLATE)
    listed = [{"name": name, "template": BASE_TEMPLATE} for name in ("default", "tool_use")]
    for base, written in (("config", listed), ("both", BASE_TEMPLATE)):
        config = json.loads((made[base] / "tokenizer_config.json").read_text())
        (made[base] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": written}))
    processor = {"processor_class": "P", "chat_template": BASE_TEMPLATE}
    (made["both"] / "processor_config.json").write_text(json.dumps(processor))
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
    save_style(style, folder, ours)
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


TOKENIZERS = {  # with the family of a model that has them
    "minimind": "llama",
    "llama-2": "llama",
    "llama-3-8b-instruct": "llama",
    "qwen2.5": "qwen2",
    "pythia": "gpt_neox",
    "phi-3": "phi3",
    "falcon": "falcon",
    "smollm2": "llama",
    "mistral": "mistral",
}


@pytest.mark.parametrize("name", some(TOKENIZERS, "minimind", "llama-2"))
def test_every_style_with_real_tokenizers(name, real_data, tmp_path):
    """Also where a tokenizer puts a blank before a text, and where the texts are special tokens."""
    folder = tmp_path / name
    shutil.copytree(real_data / "tokenizers" / name, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    (folder / "config.json").write_text(json.dumps({"model_type": TOKENIZERS[name]}))
    if name == "mistral":
        (folder / "tokenizer.model.v3").rename(folder / "tokenizer.model")
        fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    asked = [
        turns("Say 'x'\n"),
        turns("blanks  "),
        turns("Röm <s>q</s> 東京"),
        turns("q", system="Be kind. "),
    ]
    asked += [turns("q", "a", "q\n", " a ", "r"), turns("q", "a", "r", system="s")]
    for style in (*STYLES.values(), choose_style("chatml", folder)):
        template = jinja_templates(style, ours)["default"]
        for messages in asked:
            if isinstance(style, NamedStyle) and "{system}" not in style.text and messages[0]["role"] == "system":
                continue
            system = messages[: messages[0]["role"] == "system"]
            shown = [*system, messages[-1]] if style.single_turn else messages  # as in `litgpt chat`
            expected = ours.encode(style.prompt(shown), not style.own_special_tokens)
            found = theirs.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, return_dict=False
            )
            assert found == expected, (style.name, messages)


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


@pytest.mark.parametrize("base", BASES)
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
        assert {"default": written} == chat_templates(folder), "in both places"
        texts = [file.read_text() for file in folder.rglob("*.j*") if file.name != "tokenizer.json"]
        assert len(texts) > 3 and not any("BASE" in text for text in texts), "no other template beside it"


def asked(style: PromptStyle) -> list[list[dict[str, Any]]]:
    """Conversations that a style can show."""
    with_system = not isinstance(style, NamedStyle) or "{system}" in style.text
    several = [] if style.single_turn else [turns("Say it.", "a", "the fox")]
    return [turns("Say it."), *several] + with_system * [turns("Say it.", system="Be kind.")]


def check_elsewhere(folder: Path, base: Path) -> int:
    """`transformers` alone, with `peft` for an adapter, answers as we do. Returns how many answers stopped."""
    llm, theirs, stopped = LLM.load(folder), AutoTokenizer.from_pretrained(folder), 0
    model = AutoModelForCausalLM.from_pretrained(folder if (folder / "config.json").is_file() else base)
    stops: Any = model.generation_config
    if (folder / "adapter_config.json").is_file():
        model, stops = PeftModel.from_pretrained(model, folder), GenerationConfig.from_pretrained(folder)
    ours = llm.inner_tokenizer
    assert set(stops.eos_token_id if isinstance(stops.eos_token_id, list) else [stops.eos_token_id]) == ours.stops(
        llm.prompt_style
    )
    for messages in asked(llm.prompt_style):
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        text = llm.prompt_style.prompt(messages)
        assert prompt[0].tolist() == ours.encode(text, special=not llm.prompt_style.own_special_tokens)
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            answer = model.generate(prompt, generation_config=stops, do_sample=False, max_new_tokens=40)[0]
        new = answer[prompt.size(1) :].tolist()
        stopped += new[-1] in ours.stops(llm.prompt_style)
        expected = llm.generate(messages, max_new_tokens=40, temperature=0.0)
        assert theirs.decode(new, skip_special_tokens=True) == expected and expected
    return stopped


EVERY_WAY = {**{name: name for name in STYLES}, "chatml": "chatml", "file": "{folder}/mine.jinja", "own": "auto"}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("way", some(EVERY_WAY, "llama3", "chatml", "file"))
def test_transformers_alone_answers_as_we_do(way, method, bases, tmp_path):
    """After enough training to learn where answers end: from the adapter with `peft`, and from the merged folder."""
    (tmp_path / "mine.jinja").write_text(MY_TEMPLATE)
    answer = {"role": "assistant", "content": "fox jumps"}
    rows = [{"messages": [*turns("Say it."), answer]}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    base = bases["legacy" if way == "own" else "both"]
    words = ["--data.prompt_style", EVERY_WAY[way].format(folder=tmp_path), "--train.max_steps", "25"]
    words += "--optimizer.lr 0.01 --data.val_split_fraction 0 --train.epochs 25 --train.global_batch_size 4".split()
    words += ["--lora_targets", "all-linear"] if method == "lora" else []
    final = finetune(method, base, tmp_path / "out", tmp_path / "rows.json", *words)
    assert check_elsewhere(final, base), "an answer stopped"
    if method == "lora":
        main(["merge_lora", str(final)])
        assert check_elsewhere(tmp_path / "out" / "final-merged", base)


def test_a_run_says_at_its_start_what_vllm_does_not_load(bases, rows_file, tmp_path, capsys):
    for name, words in (("a", ["--lora_variant", "dora", "--train_embeddings", "true"]), ("b", [])):
        finetune("lora", bases["none"], tmp_path / name, rows_file, *words)
        before, step, after = " ".join(capsys.readouterr().out.split()).partition("step 1/1")
        assert step and "vLLM" not in after and before.count("vLLM and SGLang") == (name == "a")
        assert (f"litgpt merge_lora {tmp_path / name / 'final'}" in before) == (name == "a")


def test_a_style_in_python_leaves_no_other_template(bases, tmp_path):
    """Jinja cannot say it, so that programs refuse the folder instead of rendering other prompts."""

    class Mine(PromptStyle):
        def apply(self, prompt, *, sys_prompt=None, **kwargs):
            return f"> {prompt}"

    shutil.copytree(bases["both"], tmp_path / "m")
    save_template(Mine(), tmp_path / "m", Tokenizer(tmp_path / "m"))
    assert chat_templates(tmp_path / "m") == {}
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template is None


@pytest.mark.parametrize("base", BASES[1:])
def test_the_models_own_template_stays_as_it_is(base, bases, rows_file, tmp_path):
    """And those beside it; in both places, whichever of them the base has."""
    final, expected = finetune("lora", bases[base], tmp_path / "out", rows_file), chat_templates(bases[base])
    assert chat_templates(final) == expected and load_style(final) == checkpoint_template(bases[base])
    fields = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (final, bases[base])]
    template = fields[0].pop("chat_template")
    fields[1].pop("chat_template", None)
    listed = {t["name"]: t["template"] for t in template} if isinstance(template, list) else {"default": template}
    assert fields[0] == fields[1] and listed == expected
    found = AutoTokenizer.from_pretrained(final).chat_template
    assert (found if isinstance(found, dict) else {"default": found}) == expected
    assert (final / "chat_template.jinja").read_text() == BASE_TEMPLATE


def test_a_name_of_a_template_is_not_a_path(bases, tmp_path):
    shutil.copytree(bases["none"], tmp_path / "m")
    listed = [{"name": name, "template": BASE_TEMPLATE} for name in ("default", "../../escaped", "a/b", "..")]
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": listed}))
    style = checkpoint_template(tmp_path / "m")
    assert style is not None
    save_template(style, tmp_path / "m", Tokenizer(tmp_path / "m"))
    assert {f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*.jinja")} == {"m/chat_template.jinja"}


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


@pytest.mark.parametrize("base", some(BASES, "none", "config"))
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
