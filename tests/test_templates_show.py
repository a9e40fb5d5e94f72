"""Nothing of a conversation is lost in its text without a word: tools, calls, results, system messages, reasoning."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from litgpt.__main__ import main
from litgpt.data.check import data_problems
from litgpt.data.data_module import TokenizedDataset
from litgpt.data.forms import recognize, to_row
from litgpt.data.json_file import JSON
from litgpt.data.lost import Lookup
from litgpt.data.tokens import IN_LOSS
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompts import STYLE_FILE, chat_templates, chatml, checkpoint_template, choose_style, load_style
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import save_llama

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}},
}
ARGUMENTS = {"city": "Rome", "days": [1, 2], "unit": {"name": "°C"}}


def call(name: str = "weather", arguments: Any = ARGUMENTS, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(system: str = "", content: Any = "", *calls: Any, **answer: Any) -> list[dict[str, Any]]:
    """A question, its calls with their results, and the answer."""
    asked: list[dict] = [{"role": "system", "content": system}] if system else []
    asked.append({"role": "user", "content": "Will it rain?"})
    if calls:
        asked.append({"role": "assistant", "content": content, "tool_calls": list(calls)})
        asked += [{"role": "tool", "name": c["function"]["name"], "content": "23 degrees"} for c in calls]
    return [*asked, {"role": "assistant", "content": "It will.", **answer}]


# Templates that other models have, in short: how each writes a call, and what it needs for that.
HEAD = "{% for m in messages %}<{{ m.role }}>"
TAIL = "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
WAYS = {
    "the whole call as JSON": "{{ m.content }}" + EACH + "{{ f | tojson }}{% endfor %}",
    "arguments as JSON": "{{ m.content }}" + EACH + "{{ f.name + f.arguments | tojson }}{% endfor %}",
    "either": "{{ m.content }}"
    + EACH
    + "{{ f.name }}{{ f.arguments if f.arguments is string else f.arguments | tojson }}{% endfor %}",
    "joined as text": "{{ m.content }}" + EACH + "{{ f.name + f.arguments }}{% endfor %}",
    "printed": "{{ m.content }}" + EACH + "{{ f.name }}{{ f.arguments }}{% endfor %}",
    "name by name": "{{ m.content }}" + EACH + "{{ f.name }}{% for k, v in f.arguments.items() %}{{ k }}="
    "{{ v if v is string else v | tojson }}{% endfor %}{% endfor %}",
    "no content beside a call": "{% if m.content is defined %}{{ m.content }}{% else %}"
    + EACH
    + "{{ f | tojson }}{% endfor %}{% endif %}",
    "content that is null": "{% if m.content is none %}"
    + EACH
    + "{{ f | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}",
    "content that must be there": "{{ 'said: ' + m.content }}" + EACH + "{{ f | tojson }}{% endfor %}",
    "marked as safe": "{{ m.content }}" + EACH + '{{ \'[{"name": "\' + f.name + \'", "arguments": \' + '
    "(f.arguments if f.arguments is string else f.arguments | tojson | safe) + '}]' }}{% endfor %}",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("empty", ["", None, "missing"])
def test_calls_have_the_form_that_a_template_can_show(way, as_text, empty):
    style = ChatTemplate(HEAD + WAYS[way] + TAIL, {})
    messages = conversation(
        "", empty, call(arguments=json.dumps(ARGUMENTS, ensure_ascii=False) if as_text else ARGUMENTS)
    )
    if empty == "missing":
        del messages[1]["content"]
    text = style.render(messages, False)
    shown = text.replace(" ", "")
    for piece in ("weather", "Rome", "[1,2]", '{"name":"°C"}'):
        assert piece in shown, text
    assert "None" not in text and "\\" not in text and "&#" not in text
    assert not Lookup(style).lost(messages)


def test_arguments_that_are_not_json():
    style = ChatTemplate(HEAD + WAYS["either"] + TAIL, {})
    assert "in Rome</s>" in style.render(conversation("", "", call(arguments="in Rome")), False)


ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (ROLES, {"tool definitions", "tool calls", "reasoning", "reasoning of earlier turns"}),
        (
            "{% for m in messages if m.role in ('user', 'assistant') %}" + ROLES.partition("%}")[2],
            {
                "tool definitions",
                "tool calls",
                "tool results",
                "system messages",
                "reasoning",
                "reasoning of earlier turns",
            },
        ),
        ("{{ tools | tojson if tools }}" + ROLES, {"tool calls", "reasoning", "reasoning of earlier turns"}),
        (  # only the first of several calls
            "{{ tools | tojson if tools }}"
            + ROLES
            + "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endfor %}",
            {"tool calls", "reasoning", "reasoning of earlier turns"},
        ),
        (  # the words beside a call are dropped
            "{% for m in messages %}<{{ m.role }}>{{ m.reasoning }}"
            "{{ m.tool_calls | tojson if m.tool_calls else m.content }}</s>{% endfor %}{{ tools | tojson if tools }}",
            {"answers"},
        ),
        (
            "{{ tools | tojson if tools }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson "
            "if m.tool_calls }}{% if loop.last %}{{ m.thinking }}{% endif %}</s>{% endfor %}",
            {"reasoning of earlier turns"},
        ),
    ],
)
def test_what_is_lost(template, lost):
    first = conversation("Be kind.", "I look.", call(), call(arguments={"city": "Oslo"}), reasoning="because")
    messages = [*first, *conversation("", "", reasoning_content="since")]
    assert Lookup(ChatTemplate(template, {})).lost(messages, [TOOL]) == lost


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_any_name(name, read):
    style = ChatTemplate("{% for m in messages %}{{ m." + read + " or '' }}|{{ m.content }}{% endfor %}", {})
    messages = conversation(**{name: "because"})
    assert style.render(messages, False) == "|Will it rain?because|It will."
    assert not Lookup(style).lost(messages)


def test_other_fields_reach_the_template():
    style = ChatTemplate(
        "{% for m in messages %}{{ m.citations | tojson if m.citations }}{{ m.content }}{% endfor %}", {}
    )
    assert style.render(conversation(citations=["x"]), False).endswith('["x"]It will.')


def test_null_fields(llama):
    """As the client of OpenAI returns them, everywhere that messages come from."""
    nulls = dict.fromkeys(
        ("refusal", "audio", "annotations", "function_call", "tool_calls", "reasoning_content", "name")
    )
    template = "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% endfor %}"
    said = [{**message, **nulls} for message in conversation()]
    plain = ChatTemplate(template, {}).render(conversation(), False)
    assert ChatTemplate(template, {}).render(said, False) == plain
    assert "None" not in plain


# real templates


SHOWN = {  # what the real templates have a place for; each is seen in their sources
    "llama-2": {"system"},
    "llama-3-8b-instruct": {"system", "results"},
    "qwen2.5": {"system", "tools", "calls", "results"},
    "phi-3": set(),
    "smollm2": {"system", "results"},
    "minimind": {"system", "tools", "calls", "results", "reasoning"},
    "chatml": {"system", "tools", "calls", "results", "reasoning"},
}
ROWS: dict[str, tuple[list[dict], Any]] = {
    "system": (conversation("Be kind."), None),
    "tools": (conversation(), [TOOL]),
    "calls": (conversation("", "", call()), None),
    "results": (conversation("", "", call()), None),
    "reasoning": (conversation(reasoning="because"), None),
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("part", ROWS)
def test_parts_of_a_row_under_real_templates(name, part, real_data, tmp_path):
    """Either the part is in the text, or the row is refused, or the check says what is lost."""
    folder = real_data / "tokenizers" / ("pythia" if name == "chatml" else name)
    (messages, tools), words = (
        ROWS[part],
        {"calls": "tool calls", "results": "tool results", "tools": "tool definitions"},
    )
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"messages": messages, "tools": tools}]))
    data = JSON(str(file), val_split_fraction=0, on_bad_row="skip")
    try:
        loaded = data.load(Tokenizer(folder), folder, 4096)
    except Exception as e:  # llama-2 refuses tools' results by itself
        assert name == "llama-2" and part in ("calls", "results"), e
        return
    text = Tokenizer(folder).decode(loaded.train.row(0)[0].tolist(), skip_special=False) if len(loaded.train) else ""
    said = {
        "system": "Be kind.",
        "tools": "Tells it.",
        "calls": "Rome",
        "results": "23 degrees",
        "reasoning": "because",
    }
    shown = said[part] in text
    assert shown == (part in SHOWN[name])
    told = [problem for problem in data_problems(loaded) if words.get(part, part) in problem]
    assert bool(told) == (not shown and bool(text))


def test_chatml_shows_tools_as_qwen_does(real_data):
    """The same text as Qwen's own template, which `transformers` renders."""
    folder = real_data / "tokenizers" / "qwen2.5"
    theirs, ours = AutoTokenizer.from_pretrained(folder), chatml(folder)
    rows = [to_row(fields, recognize(fields, "row"), "row") for fields in glaive(real_data)[:40]]
    wanted = [
        conversation("Be kind.", "", call(), call()),
        conversation("Be kind.", "Let me see.", call()),
        conversation("Be kind."),
    ]
    asked: list[tuple[list[dict], Any]] = [(m, tools) for m in wanted for tools in (None, [TOOL])]
    asked += [([{"role": "system", "content": "Be kind."}, *row.messages], row.tools) for row in rows if row]
    for messages, tools in asked:
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert ours.render(messages, False, tools) == expected
        assert not Lookup(ours).lost(messages, tools)
    assert "<think>\nbecause\n</think>\n\nIt will.<|im_end|>" in ours.render(conversation(reasoning="because"), False)


def glaive(real_data: Path) -> list[dict]:
    return json.loads((real_data / "instruct" / "glaive_toolcall_en_demo.json").read_text())


@pytest.fixture
def with_tokenizer(tmp_path, tokenizer_file, real_data):
    """A tiny model with a real tokenizer."""

    def make(name: str) -> Path:
        size = Tokenizer(real_data / "tokenizers" / name).vocab_size
        folder = save_llama(tmp_path / name, tokenizer_file, vocab_size=size, hidden_size=8, num_hidden_layers=1)
        shutil.copytree(real_data / "tokenizers" / name, folder, dirs_exist_ok=True)
        return folder

    return make


def test_a_run_and_the_check_refuse_rows_whose_calls_are_lost(with_tokenizer, real_data, tmp_path, capsys):
    """SmolLM2's template has no calls: a quarter of the answers of this file would be empty."""
    folder, file = with_tokenizer("smollm2"), tmp_path / "rows.json"
    file.write_text(json.dumps(glaive(real_data)[:20]))
    words = [str(folder), "--data", "JSON", "--data.json_path", str(file)]
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", *words])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "tool calls" in out and "tool definitions" in out and "--data.prompt_style" in out
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "lora", *words, "--out_dir", str(tmp_path / "out")])
    assert stop.value.code == 2 and "tool calls" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main(["data", "check", *words, "--data.prompt_style", "chatml"])
    assert "tool calls" not in capsys.readouterr().out


# named templates


def two_templates(folder: Path, place: str) -> None:
    templates = {"default": "{% for m in messages %}[{{ m.content }}]</s>{% endfor %}"}
    templates["tool_use"] = (
        "{{ tools | tojson }}{% for m in messages %}({{ m.role }}:{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }})</s>{% endfor %}"
    )
    templates["rag"] = "no"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "files":
        (folder / "chat_template.jinja").write_text(templates.pop("default"))
        (folder / "additional_chat_templates").mkdir()
        for name, template in templates.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)
        config["chat_template"] = "outdated"
    else:
        listed = [{"name": name, "template": template} for name, template in templates.items()]
        config["chat_template"] = listed if place == "list" else templates
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("place", ["files", "list", "object"])
def test_the_template_for_tools(place, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    two_templates(tmp_path / "m", place)
    theirs, style = AutoTokenizer.from_pretrained(tmp_path / "m"), checkpoint_template(tmp_path / "m")
    for messages, tools in ((conversation("", "", call()), [TOOL]), (conversation(), [TOOL]), (conversation(), None)):
        asked = [{k: v for k, v in m.items() if k != "content" or v} for m in messages]
        expected = theirs.apply_chat_template(asked, tools=tools, tokenize=False)
        text, answers = style.render_row(messages, tools, "</s>")
        assert text == expected
        assert [text[a:b] for a, b, _ in answers][-1].endswith("It will.)</s>" if tools else "It will.]</s>")


def test_the_template_for_tools_is_copied_and_remembered(llama, tmp_path):
    from litgpt.text.prompts import save_style
    from litgpt.text.tokenizer import copy_files

    shutil.copytree(llama, tmp_path / "m")
    two_templates(tmp_path / "m", "files")
    (tmp_path / "copy").mkdir()
    copy_files(tmp_path / "m", tmp_path / "copy")
    assert chat_templates(tmp_path / "copy") == chat_templates(tmp_path / "m")
    save_style(checkpoint_template(tmp_path / "m"), tmp_path / "copy", Tokenizer(llama))
    assert (tmp_path / "copy" / STYLE_FILE).is_file()
    assert load_style(tmp_path / "copy") == checkpoint_template(tmp_path / "m")
    save_style(choose_style("chatml", llama), tmp_path / "copy", Tokenizer(llama))
    assert list(chat_templates(tmp_path / "copy")) == ["default"], "the template for tools belonged to the other style"


# where an answer ends


ONE_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
BETWEEN = (
    "{% for m in messages %}{% if m.role == 'user' and not loop.first %}</s>{% endif %}{{ m.role }}: {{ m.content }}\n"
    "{% endfor %}</s>"
)
UNSAID = "{% for m in messages if m.role != 'tool' %}{{ m.role }}: {{ m.content }}\n{% endfor %}</s>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ONE_STOP, ["first\n", "yes yes\n", "last\n</s>"]),
        (BETWEEN, ["first\n</s>", "yes yes\n</s>", "last\n</s>"]),
        (UNSAID, ["first\n", "yes yes\n", "last\n</s>"]),
    ],
)
def test_no_prompt_is_trained_where_the_stop_token_stands_at_the_end(template, expected, llama, tmp_path):
    said = [("user", "one"), ("assistant", "first"), ("user", "yes"), ("assistant", "yes yes"), ("user", "last")]
    rows = [{"role": role, "content": text} for role, text in [*said, ("assistant", "last")]]
    if template is UNSAID:
        rows.insert(2, {"role": "tool", "content": "hidden"})
    text, answers = ChatTemplate(template, {"eos_token": "</s>"}).render_row(rows, None, "</s>")
    assert [text[a:b] for a, b, _ in answers] == expected


def trained(loaded: TokenizedDataset, tokenizer: Tokenizer) -> str:
    ids, marks = loaded.train.row(0)
    return tokenizer.decode(ids[(marks & IN_LOSS).bool()].tolist(), skip_special=False)


@pytest.mark.parametrize("trained_on", [None, "all"])
def test_answers_in_a_prompt_are_trained_only_with_the_prompt(llama, tmp_path, trained_on):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"prompt": turns, "completion": "d"}]))
    tokenizer = Tokenizer(llama)
    loaded = JSON(str(file), val_split_fraction=0, train_on=trained_on, prompt_style="chatml").load(
        tokenizer, llama, 4096
    )
    assert trained(loaded, tokenizer) == (
        "d</s>" if trained_on is None else tokenizer.decode(loaded.train.row(0)[0].tolist(), False)
    )
