"""The named prompt styles render exactly what they are known for."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.errors import UserError
from litgpt.model.config import known_models
from litgpt.text.model_styles import report, style_named
from litgpt.text.prompts import choose_style, load_style
from litgpt.text.styles import STYLES

SYSTEM, USER, ANSWER = "Answer as a fox.", "What does the fox say? {system} {x}", "Ring {input} {}"
GOLDEN = {  # sha256 of what `renderings` gives, its first 12 digits
    "none": "b6f941bbf7cb",
    "alpaca": "582cea22d0ff",
    "flan": "a1c1777323e3",
    "longform": "93f028a3bdc3",
    "stablelm-alpha": "a286173402cc",
    "stablelm-zephyr": "cf2b2eeb0251",
    "falcon": "f7e03cfccdd8",
    "falcon3": "257e58ba936d",
    "llama2-function-calling": "abc47a59a32e",
    "llama2": "4ffe63c0de91",
    "freewilly2": "318795f2b761",
    "platypus": "76f85b3ae2ac",
    "stablecode": "e1d2bf5c7371",
    "codellama": "8b42d9de6168",
    "phi-1": "30ac2b7eae22",
    "phi-2": "e3c59ab061f7",
    "phi-3": "0b2b048c5efa",
    "phi-4": "79a9675ea63a",
    "phi-4-reasoning": "a1a3a0e8b2cd",
    "phi-4-mini": "ace5e9092113",
    "phi-4-mini-reasoning": "95e2cb5c718c",
    "tinyllama": "a02d18a96be7",
    "gemma": "0c00c4dda189",
    "llama3": "f768fc75a5cb",
    "olmo": "6e1397d74bd5",
    "qwen2.5": "e8587425e6ca",
    "qwen2.5-math": "df4a3c6da87e",
    "qwq": "1dba3fb062c9",
    "qwen3": "3d75bdc5cc1f",
    "smollm2": "b08b2e9d074a",
    "salamandra": "8c1ecf062819",
    "r1": "7c5bee9c0039",
    "default": "b6f941bbf7cb",
}
SHOWN = {
    "falcon": "{0}\nAnswer:",
    "gemma": "<start_of_turn>user\n{0}<end_of_turn>\n<start_of_turn>model\n",
    "qwen3": "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n",
    "none": "{0}",
}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str, extra: str = "") -> dict[str, str]:
    return {"role": "user", "content": text, "input": extra}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SEVERAL = [user(USER), assistant(ANSWER), user("Louder?"), assistant("Ring!"), user("And now?", "softly")]


def renderings(name: str) -> list[str]:
    """A prompt, one with an input, with a system message, with both, and several turns; refused is empty."""
    made = []
    first, with_input = user(USER), user(USER, "{prompt}")
    for messages in [first], [with_input], [system(SYSTEM), first], [system(SYSTEM), with_input], SEVERAL:
        try:
            made.append(STYLES[name].prompt(messages))
        except UserError:
            made.append("")
    return made


@pytest.mark.parametrize("name", STYLES)
def test_golden(name):
    digest = hashlib.sha256(json.dumps(renderings(name)).encode()).hexdigest()
    assert digest[:12] == GOLDEN[name]


def test_every_known_style(real_data):
    file = real_data.parent / "facts" / "prompt_styles.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {row["style"] for row in rows} | {"none", "default", "falcon3", "r1"} == set(STYLES)
    several = [system("<<SYSTEM>>"), user("<<USER1>>"), assistant("<<ANSWER1>>"), user("<<USER2>>")]
    for row in rows:
        style = STYLES[row["style"]]
        assert style.name == row["style"]
        assert style.prompt([user("<<PROMPT>>")]) == row["plain"], style.name
        if "with_input" in row:
            assert style.prompt([user("<<PROMPT>>", "<<INPUT>>")]) == row["with_input"], style.name
        if "with_system" in row:
            assert style.prompt([system("<<SYSTEM>>"), user("<<PROMPT>>")]) == row["with_system"], style.name
        else:
            with pytest.raises(UserError, match="system message"):
                style.prompt([system("<<SYSTEM>>"), user("<<PROMPT>>")])
        if "multi_turn" in row:
            assert style.prompt(several) == row["multi_turn"], style.name


@pytest.mark.parametrize(
    ("name", "folder", "opening"),
    [
        ("llama3", "llama-3-8b-instruct", [system(SYSTEM)]),
        ("qwen2.5", "qwen2.5", []),
        ("qwen2.5", "qwen2.5", [system(SYSTEM)]),
        ("smollm2", "smollm2", []),
        ("smollm2", "smollm2", [system(SYSTEM)]),
    ],
)
def test_several_turns_as_the_chat_template_has_them(real_data, name, folder, opening):
    from transformers import AutoTokenizer

    turns = [*opening, *({k: m[k] for k in ("role", "content")} for m in SEVERAL)]
    theirs = AutoTokenizer.from_pretrained(real_data / "tokenizers" / folder)
    wanted = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert STYLES[name].prompt(turns) == wanted


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_row_holds_is_not_looked_at(name):
    text = "{system} {prompt} {input} {0} {{}} %s \\1 \\g<0>"
    assert STYLES[name].prompt([user(text)]) == SHOWN[name].replace("{0}", text)
    if name != "none":
        assert STYLES[name].prompt([user(text, text)]) == SHOWN[name].replace("{0}", f"{text}\n\n{text}")


def test_a_system_message_is_not_looked_at_either():
    made = STYLES["llama2"].prompt([system("{prompt}{system}"), user("{input}")])
    assert made == "[INST] <<SYS>>\n{prompt}{system}\n<</SYS>>\n\n {input} [/INST] "


def test_none_and_default():
    assert STYLES["default"] is STYLES["none"]
    assert STYLES["none"].prompt([user("a", "b")]) == "a\nb"


def test_an_empty_system_message_is_none():
    for style in STYLES.values():
        assert style.prompt([system(""), user("a")]) == style.prompt([user("a")])


def test_several_turns():
    made = STYLES["phi-3"].prompt([user("a", "b"), assistant("c"), user("d", "e")])
    assert made == (
        "<|system|>\nYou are a helpful assistant.<|end|>\n<|user|>\na\n\nb<|end|>\n<|assistant|>\n"
        "c<|end|>\n<|user|>\nd\n\ne<|end|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.close is not None])
def test_a_prompt_is_the_beginning_of_the_next(name):
    style, conversation = STYLES[name], [*SEVERAL, assistant("Ring?")]
    text, answers = style.render_row(conversation)
    assert [i for *_, i in answers] == [1, 3, 5]
    stop = str(style.close).strip()
    assert [text[a:b] for a, b, _ in answers] == [ANSWER + stop, "Ring!" + stop, "Ring?"]
    for start, _, i in answers:
        assert text[:start] == style.prompt(conversation[:i])


def test_a_row_of_one_answer():
    text, answers = STYLES["alpaca"].render_row([user("a", "b"), assistant("c")])
    assert text.endswith("### Input:\nb\n\n### Response:\nc") and answers == [(len(text) - 1, len(text), 1)]


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("gemma", [system("s"), user("a")], "'gemma' does not support a system message"),
        ("alpaca", [user("a"), assistant("b"), user("c")], "single turn"),
        ("alpaca", [user("a"), assistant("b"), user("c")], "llama3"),
        ("llama3", [], "got none"),
        ("llama3", [system("s")], "got none"),
        ("llama3", [assistant("a")], "got assistant"),
        ("llama3", [user("a"), assistant("b")], "got user, assistant"),
        ("llama3", [user("a"), user("b"), user("c")], "got user, user, user"),
        ("llama3", [user("a"), system("s"), user("c")], "got user, system, user"),
        ("llama3", [user("a"), {"role": "tool", "content": "b"}, user("c")], "got user, tool, user"),
        ("llama3", [user("a"), {**assistant(""), "tool_calls": [{}]}, user("c")], "tools"),
    ],
)
def test_refused(name, messages, words):
    with pytest.raises(UserError) as e:
        STYLES[name].prompt(messages)
    assert words in str(e.value) and "\n" not in str(e.value) and f"the prompt style {name!r}" in str(e.value)


def test_tools_are_refused():
    with pytest.raises(UserError, match="tools"):
        STYLES["qwen3"].prompt([user("a")], tools=[{"name": "search"}])
    with pytest.raises(UserError, match="tools"):
        STYLES["qwen3"].render_row([user("a"), {**assistant(""), "tool_calls": [{}]}])


def test_names_and_ends():
    assert all(style.name == name for name, style in STYLES.items() if name != "default")
    assert not any(style.own_special_tokens or style.turn_end({"<|im_end|>"}) for style in STYLES.values())


# styles that are known by the name of a model

BY_NAME = {  # what LitGPT 0.5.13 takes for each of its models
    name: style
    for style, names in json.loads(Path(__file__).with_name("model_styles_litgpt.json").read_text()).items()
    for name in names.split()
}
OURS = {  # LitGPT's pattern for Llama 3 matches the first name as well, and it does not know the others
    "CodeLlama-34b-Instruct-hf": "codellama",
    **{name: "qwen3" for name in known_models() if name.startswith("Qwen3.5-")},
    **dict.fromkeys((f"Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "32B")), "qwen3"),
}


def test_by_the_name_of_a_known_model():
    for name, row in known_models().items():
        for named in (name, row["repo_id"], name.lower()):
            style = style_named(named)
            assert (style.name if style else None) == {**BY_NAME, **OURS}.get(name), named
    assert len(BY_NAME) > 138
    for name in ("", "phi-20", "my-model", "pico"):
        assert style_named(name) is None


@pytest.fixture
def phi(tmp_path, monkeypatch):
    """A model without a template under the name of phi-2."""
    monkeypatch.chdir(tmp_path)
    report.cache_clear()
    folder = tmp_path / "checkpoints" / "microsoft" / "phi-2"
    shutil.copytree(PICO, folder)
    for name in ("chat_template.jinja", "prompt_style.yaml", "checksums.json", "parity.json"):
        (folder / name).unlink(missing_ok=True)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    fields.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def test_generate_and_training_take_the_style_of_the_name(phi, capsys):
    """And say so once."""
    words = ["generate", "microsoft/phi-2", "--prompt", "Hi", "--max_new_tokens", "2", "--accelerator", "cpu"]
    main(words)
    said = capsys.readouterr()
    assert "Instruct: Hi\nOutput:" in said.err
    assert said.err.count("phi-2 has no chat template") == 1
    assert load_style(phi).name == choose_style("auto", phi).name == "phi-2"
    assert choose_style("auto", phi, chat=True).name == "chatml"  # phi-2 has no turns
    assert "chat template" not in capsys.readouterr().err


def test_a_name_counts_only_without_a_template_and_in_checkpoints(phi, tmp_path):
    copy = shutil.copytree(phi, tmp_path / "phi-2")
    assert load_style(copy).name == "none" and choose_style("auto", copy).name == "alpaca"
    (copy / "model_config.yaml").write_text(yaml.safe_dump({"name": "stablelm-zephyr-3b"}))
    assert (
        load_style(copy).name == "stablelm-zephyr" and choose_style("auto", copy, chat=True).name == "stablelm-zephyr"
    )
    (phi / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_style(phi).name == "chat"
