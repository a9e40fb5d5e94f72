"""Token ids are those of `apply_chat_template` in `transformers`, and trained are exactly the answers with their stop
token."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from litgpt.data.data_module import TokenizedDataset
from litgpt.data.forms import Row, recognize, to_row
from litgpt.data.json_file import JSON
from litgpt.data.tokens import IN_LOSS
from litgpt.errors import UserError
from litgpt.text.chat_template import ChatTemplate, template_message
from litgpt.text.prompts import checkpoint_template, choose_style
from litgpt.text.tokenizer import Tokenizer

TOKENIZERS = ["llama-2", "llama-3-8b-instruct", "qwen2.5", "phi-3", "smollm2", "minimind"]
FILES = ["alpaca_en_demo.json", "lima.json", "sharegpt_dummy.json", "glaive_toolcall_en_demo.json"]
STOPS = {"llama-2": "</s>", "llama-3-8b-instruct": "<|eot_id|>", "phi-3": "<|end|>"}  # <|im_end|> in the others
N = 60


def read(file: Path) -> list[Row]:
    """The first rows, those with several turns among them."""
    rows = json.loads(file.read_text())
    rows = [r for r in rows if r.get("history")][:10] + rows[:N]
    return [row for r in rows if (row := to_row(r, recognize(r, "row"), "row"))]


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request: pytest.FixtureRequest, real_data: Path) -> tuple[str, Any, Tokenizer]:
    folder = real_data / "tokenizers" / request.param
    return request.param, AutoTokenizer.from_pretrained(folder), Tokenizer(folder)


@pytest.mark.parametrize("file", FILES)
def test_ids_and_refusals(pair, file, real_data):
    name, theirs, ours = pair
    style = checkpoint_template(ours.folder)
    end = style.turn_end(ours.special_tokens)
    assert end == STOPS.get(name, "<|im_end|>")
    refused = 0
    for row in read(real_data / "instruct" / file):
        messages = [template_message(m) for m in row.messages]
        try:
            expected = theirs.apply_chat_template(messages, tools=row.tools, tokenize=True, return_dict=False)
        except Exception as e:
            with pytest.raises(UserError) as refusal:
                style.render_row(row.messages, row.tools, end)
            assert str(e) in str(refusal.value)
            refused += 1
            continue
        text, answers = style.render_row(row.messages, row.tools, end)
        assert ours.encode(text, special=False) == expected
        assert [i for _, _, i in answers] == [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        for start, stop, i in answers:
            words = (row.messages[i]["content"] or "").strip()
            answer = text[start:stop]
            assert answer.endswith(end) and words in answer
            if not row.messages[i].get("tool_calls"):  # nothing but the words and the stop token
                assert answer.removesuffix(end).strip() == words or "<think>" in row.messages[i]["content"]
                assert text[:start].rstrip() == style.prompt(row.messages[:i], row.tools).rstrip()
    assert refused == 0 or (name, file) == ("llama-2", "glaive_toolcall_en_demo.json")


@pytest.mark.parametrize("file", FILES)
def test_trained_tokens(pair, file, real_data, tmp_path):
    """What a run trains on, decoded: the answers, each with its stop token, and nothing else."""
    name, _, ours = pair
    rows = json.loads((real_data / "instruct" / file).read_text())
    if name == "llama-2":  # its template refuses tools
        rows = [r for r in rows if not any(m["from"] == "function_call" for m in r.get("conversations", []))]
    path = tmp_path / file
    path.write_text(json.dumps(rows[:N]))
    loaded = JSON(str(path), val_split_fraction=0).load(ours, ours.folder, 100_000)
    assert loaded.mask_prompt and loaded.style.name == "chat"
    assert loaded.counts.no_stop == loaded.counts.two_bos == loaded.counts.truncated == 0
    end = STOPS.get(name, "<|im_end|>")
    for i, fields in enumerate(rows[: len(loaded.train)]):
        row = to_row(fields, recognize(fields, "row"), "row")
        expected = [m for m in row.messages if m["role"] == "assistant"]
        ids, marks = loaded.train.row(i)
        text = ours.decode(ids[(marks & IN_LOSS).bool()].tolist(), skip_special=False)
        assert text.count(end) == len(expected) and text.endswith(end)
        for said, message in zip(text.split(end), expected):
            if not message.get("tool_calls"):
                assert said.strip() == message["content"].strip()


def load(rows: list[Any], folder: Path, path: Path, **options: Any) -> tuple[TokenizedDataset, Tokenizer]:
    path.write_text(json.dumps(rows))
    tokenizer = Tokenizer(folder)
    return JSON(str(path), val_split_fraction=0, **options).load(tokenizer, folder, 4096), tokenizer


def trained_text(loaded: TokenizedDataset, tokenizer: Tokenizer, i: int = 0) -> str:
    ids, marks = loaded.train.row(i)
    return tokenizer.decode(ids[(marks & IN_LOSS).bool()].tolist(), skip_special=False)


TURNS = {
    "messages": [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second"},
    ]
}


def test_what_is_trained(llama, tmp_path):
    """The tiny model has no template: conversations are chatml, with EOS at the end of a turn."""
    path = tmp_path / "rows.json"
    loaded, tokenizer = load([TURNS], llama, path)
    assert loaded.style.name == "chatml"
    assert trained_text(loaded, tokenizer) == "first</s>second</s>"
    assert trained_text(*load([TURNS], llama, path, train_on="last")) == "second</s>"
    everything = trained_text(*load([TURNS], llama, path, train_on="all"))
    assert everything == trained_text(*load([TURNS], llama, path, mask_prompt=False))
    assert everything.startswith("<|im_start|>user\none?</s>")
    rows = json.loads(json.dumps(TURNS))
    rows["messages"][1]["weight"] = 0
    assert trained_text(*load([rows], llama, path)) == "second</s>"
    everything = trained_text(*load([rows], llama, path, train_on="all"))
    assert "one?" in everything and "first" not in everything, "what a row leaves out is left out whatever is trained"


def test_answers_that_repeat_the_prompt(llama, tmp_path):
    """Where the words stand in the prompt too, only the answer is trained."""
    same = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}] * 2
    loaded, tokenizer = load([{"messages": same}], llama, tmp_path / "rows.json")
    assert trained_text(loaded, tokenizer) == "yes</s>yes</s>"
    template = "<|im_start|>assistant\nno</s>\n"
    nasty = [{"role": "user", "content": template}, {"role": "assistant", "content": "no"}]
    loaded, tokenizer = load([{"messages": nasty}], llama, tmp_path / "rows.json")
    assert trained_text(loaded, tokenizer) == "no</s>"
    inside = [{"role": "user", "content": "x"}, {"role": "assistant", "content": template}]
    loaded, tokenizer = load([{"messages": inside}], llama, tmp_path / "rows.json")
    assert (
        trained_text(loaded, tokenizer) == template.strip() + "</s>"
        or trained_text(loaded, tokenizer) == template + "</s>"
    )


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


MESSAGE = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LAST = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
THOUGHTS = (  # shown behind the last question only, under lines of their own
    LAST + "{% for m in messages %}{% if m.role != 'assistant' %}" + MESSAGE + "{% else %}<|im_start|>assistant\n"
    "{% set parts = m.content.split('</think>') %}{% set thought = parts[0] if parts|length > 1 else '<think>' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought.split('<think>')[1] }}\n</think>\n\n{% endif %}"
    "{{ parts[-1] }}<|im_end|>\n{% endif %}{% endfor %}" + ASSISTANT
)
LATE_TOOLS = (  # they stand before the last question only
    LAST + "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
GREETING = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}" + MESSAGE + "{% endfor %}" + ASSISTANT
)
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}" + ASSISTANT
)
QUOTED = "<think>hm</think>one"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            THOUGHTS,
            [
                ("user", "q"),
                ("assistant", "<think>hm</think>one"),
                ("user", "<think>hm</think>one"),
                ("assistant", "x"),
            ],
            ["one<|im_end|>", "<think>\n\n</think>\n\nx<|im_end|>"],
        ),
        (
            THOUGHTS,
            [("user", "q"), ("assistant", "<think>is <|im_end|> one?</think>" + "long " * 50)],
            ["<think>\nis <|im_end|> one?\n</think>\n\n" + "long " * 50 + "<|im_end|>"],
        ),
        (
            LATE_TOOLS,
            [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")],
            ["one<|im_end|>", " two<|im_end|>"],
        ),
        (
            GREETING,
            [("assistant", "hello"), ("user", "q"), ("assistant", "<|im_end|>")],
            ["hello<|im_end|>", "<|im_end|><|im_end|>"],
        ),
        (GREETING, [("assistant", "")], ["<|im_end|>"]),
        (
            CALLS,
            [("user", "q"), ("assistant", "<|im_end|>", "call")],
            ['<|im_end|><call>"<|im_end|>"</call><|im_end|>'],
        ),
        (
            CALLS,
            [("user", "q"), ("assistant", "", "call"), ("user", "r"), ("assistant", " b ")],
            ['<call>"<|im_end|>"</call><|im_end|>', " b <|im_end|>"],
        ),
    ],
)
def test_answers_in_templates_that_write_more_than_messages(template, messages, expected):
    """Neither a word of the user nor of the template is trained, and every answer ends with its own stop token."""
    rows = [says(role, text, **({"tool_calls": ["<|im_end|>"]} if more else {})) for role, text, *more in messages]
    text, answers = ChatTemplate(template, {}).render_row(rows, [{"name": "f"}], "<|im_end|>")
    assert [text[start:end] for start, end, _ in answers] == expected


def test_names_that_are_not_there():
    """They are undefined, as in Jinja itself, also where the sandbox is passed by."""
    source = (
        "{% set ns = namespace(a=1) %}{{ ns.a }}{{ ns.b is defined }}{% for m in messages %}{{ loop.x is defined }}"
        "{{ m.x is defined }}{{ m.content.x is defined }}{{ loop.last }}{{ m.content.strip() }}{% endfor %}"
    )
    rendered = ChatTemplate(source, {}).render([says("user", " a ")], False)
    assert rendered == "1FalseFalseFalseFalseTruea"


def test_the_sandbox(llama):

    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{% for m in messages %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
        "{% set ns = namespace() %}{{ ns.__class__.__init__.__globals__ }}",
    ):
        with pytest.raises(UserError, match="refuses"):
            ChatTemplate(source, {}).render([{"role": "user", "content": "a"}], False)
    with pytest.raises(UserError, match="not valid"):
        ChatTemplate("{% for %}", {}).render([], False)


def test_json_as_transformers_writes_it():
    tool = {"name": "é", "parameters": {"b": [1, None, {"x": "<'>"}], "a": {}}}
    for options in ("", "indent=4", "indent=0", "ensure_ascii=True", "indent=2, sort_keys=True, separators=(',', ':')"):
        text = ChatTemplate(f"{{{{ tools[0] | tojson({options}) }}}}", {}).render([says("user", "a")], False, [tool])
        given = eval(f"dict({options})")
        assert text == json.dumps(tool, **{"ensure_ascii": False, **given})


def test_json_whose_indentation_would_fill_the_memory():
    """Four megabytes in three hundred lists are two gigabytes of blanks."""
    nested: list[Any] = [1] * 500_000
    for _ in range(300):
        nested = [nested]
    with pytest.raises(UserError, match="characters"):
        ChatTemplate("{{ tools | tojson(indent=4) }}", {}).render([says("user", "a")], False, nested)
    assert len(ChatTemplate("{{ tools | tojson }}", {}).render([says("user", "a")], False, nested)) > 10**6


def test_styles_by_option(llama, tmp_path, real_data):
    chat = real_data / "tokenizers" / "smollm2"
    assert choose_style("auto", llama).name == "alpaca"
    assert choose_style("auto", llama, chat=True).name == "chatml"
    assert choose_style("auto", chat).name == choose_style("chat", chat, chat=True).name == "chat"
    assert choose_style("alpaca", chat, chat=True).name == "alpaca"
    file = tmp_path / "my.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    text, answers = choose_style(str(file), chat).render_row(TURNS["messages"][:2], None, "<|im_end|>")
    assert text == "user: one?<|im_end|>assistant: first<|im_end|>"
    assert [text[a:b] for a, b, _ in answers] == ["assistant: first<|im_end|>"]  # this template writes no prompt
