"""Forms of rows: what each becomes, how it is recognized, and what is said of rows that cannot be used."""

import json
from collections import Counter
from typing import Any

import pytest

from litgpt.data.data_module import RowSource
from litgpt.data.forms import FORMS, Row, recognize, rename, to_row, to_sides
from litgpt.data.row_files import read_rows
from litgpt.errors import UserError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [{"name": "add", "parameters": {"type": "object"}}]


def user(content: str, **more: Any) -> dict:
    return {"role": "user", "content": content, **more}


def bot(content: str, **more: Any) -> dict:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def says(who: str, value: Any) -> dict:
    return {"from": who, "value": value}


Q, A, B = user("q"), bot("a"), bot("b")


def convert(fields: Any) -> tuple[str, Row | None]:
    form = recognize(fields, "f.json, row 1 (index 0)")
    return form, to_row(fields, form, "f.json, row 1 (index 0)")


def messages(*given: dict, **more: Any) -> list[dict]:
    row = convert({"messages": list(given), **more})[1]
    assert row
    return row.messages


def error(fields: Any, form: str = "", **options: Any) -> str:
    with pytest.raises(UserError) as e:
        to_row(fields, form or recognize(fields, "f.jsonl, line 3"), "f.jsonl, line 3", **options)
    assert str(e.value).startswith("f.jsonl, line 3, ") and "\n" not in str(e.value)
    return str(e.value).removeprefix("f.jsonl, line 3, ")


@pytest.mark.parametrize(
    ("form", "fields", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}, Row([Q, A])),
        ("alpaca", {"instruction": "q", "input": None, "output": "a"}, Row([Q, A])),
        ("alpaca", {"instruction": "q", "input": "i", "output": "a", "text": "t"}, Row([user("q", input="i"), A])),
        (
            "alpaca",
            {"instruction": "q", "context": "i", "response": "a", "category": "qa"},
            Row([user("q", input="i"), A]),
        ),
        ("history", {"instruction": "q", "input": "", "output": "a", "history": []}, Row([Q, A])),
        (
            "history",
            {"instruction": "q", "output": "a", "history": [["1", "2"], ["3", "4"]]},
            Row([user("1"), bot("2"), user("3"), bot("4"), Q, A]),
        ),
        (
            "history",
            {"instruction": "q", "output": "a", "history": '[["1", "2"]]'},  # as CSV has it
            Row([user("1"), bot("2"), Q, A]),
        ),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, Row([Q, A])),
        ("prompt_completion", {"prompt": [system("s"), Q], "completion": [A]}, Row([system("s"), Q, A])),
        ("question_answer", {"question": "q", "answer": "a"}, Row([Q, A])),
        ("messages", {"messages": [system("s"), Q, A], "prompt": "q"}, Row([system("s"), Q, A])),
        ("messages", {"messages": [Q, A], "tools": TOOLS}, Row([Q, A], TOOLS)),
        ("messages", {"messages": [Q, A], "tools": json.dumps(TOOLS)}, Row([Q, A], TOOLS)),
        ("messages", {"messages": json.dumps([Q, A]), "tools": ""}, Row([Q, A])),
        ("messages", {"messages": [Q, A], "label": None, "output": None}, Row([Q, A])),
        ("sharegpt", {"conversations": [says("human", "q"), says("gpt", "a")], "id": "1"}, Row([Q, A])),
        (
            "sharegpt",
            {"system": "s", "conversations": [says("user", "q"), says("chatgpt", "a")], "tools": "[]"},
            Row([system("s"), Q, A]),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    says("system", "s"),
                    says("human", "q"),
                    says("function_call", '{"name": "add", "arguments": {"a": 1, "b": 2}}'),
                    says("observation", "3"),
                    says("function_call", '[{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}]'),
                    says("function_response", "3"),
                    says("bing", "a"),
                ],
                "tools": json.dumps(TOOLS),
            },
            Row(
                [
                    system("s"),
                    Q,
                    bot("", tool_calls=[CALL]),
                    {"role": "tool", "content": "3"},
                    bot("", tool_calls=[CALL]),
                    {"role": "tool", "content": "3"},
                    A,
                ],
                TOOLS,
            ),
        ),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, Row([Q, A])),
        ("preference", {"prompt": [system("s"), Q], "chosen": [A], "rejected": [B]}, Row([system("s"), Q, A])),
        ("preference", {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, Row([Q, A])),
        ("preference", {"prompt": [system("s"), Q], "chosen": [Q, A], "rejected": [Q, B]}, Row([system("s"), Q, A])),
        (
            "preference",
            {"prompt": [system("t"), Q], "chosen": [system("s"), Q, A], "rejected": "b"},
            Row([system("s"), Q, A]),
        ),
        ("preference", {"chosen": [Q, A], "rejected": [Q, B]}, Row([Q, A])),
        (
            "preference",
            {"conversations": [says("human", "q")], "chosen": says("gpt", "a"), "rejected": says("gpt", "b")},
            Row([Q, A]),
        ),
        ("label", {"messages": [Q, A], "label": True}, Row([Q, A])),
        ("label", {"conversations": [says("human", "q"), says("gpt", "a")], "kto_tag": True}, Row([Q, A])),
        ("label", {"prompt": "q", "completion": "a", "label": "True"}, Row([Q, A])),
        ("text", {"text": "t\n", "id": 3}, Row([], text="t\n")),
        ("text", {"text": "t", "label": 1}, Row([], text="t")),
        ("text", {"text": "x" * 1_000_001}, Row([], text="x" * 1_000_001)),
    ],
)
def test_forms(form, fields, row):
    before = json.dumps(fields)
    found, made = convert(fields)
    assert found == form
    assert made == row
    assert json.dumps(fields) == before, "the row of the file was changed"


@pytest.mark.parametrize("label", [False, 0, "false", "False"])
def test_unwanted_answers_are_left_out(label):
    assert convert({"messages": [Q, A], "label": label}) == ("label", None)
    assert convert({"prompt": "q", "completion": "a", "kto_tag": label}) == ("label", None)


def test_roles():
    said = [{"role": role, "content": "x"} for role in ("developer", "User", "tool", "function", "assistant")]
    assert [m["role"] for m in messages(*said)] == ["system", "user", "tool", "tool", "assistant"]


def test_contents():
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}]
    assert messages(user(parts), bot(None, tool_calls=[CALL]), A) == [user("ab"), bot("", tool_calls=[CALL]), A]


def test_tool_calls():
    def calls(*given: Any) -> list:
        return messages(Q, bot("", tool_calls=list(given)))[1]["tool_calls"]

    as_text = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    assert calls(as_text, CALL["function"]) == [CALL, CALL]
    assert calls({**CALL, "id": "x"}, {**CALL, "id": None}) == [{**CALL, "id": "x"}, CALL]
    assert calls({"name": "add", "arguments": "a=1"})[0]["function"]["arguments"] == "a=1"
    assert calls({"name": "add", "arguments": None})[0]["function"]["arguments"] == {}
    assert messages(Q, bot(None, function_call=as_text["function"]))[1] == bot("", tool_calls=[CALL])


def test_other_fields_of_messages_are_kept():
    """Whatever a template may read, but not what is null."""
    result = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "x", "else": {"a": [1, None]}}
    assert messages(Q, result, A)[1] == result
    beside = {"thinking": "t", "reasoning": "r", "reasoning_content": "c", "citations": ["x"]}
    assert messages(Q, bot("a", name=None, tool_calls=None, **beside)) == [Q, bot("a", **beside)]


# What a row of each form has at least, and its answer. What stands beside it has to arrive in the messages.
SHORTEST: list[dict] = [
    {"instruction": "q", "output": "a"},
    {"instruction": "q", "response": "a"},
    {"instruction": "q", "output": "a", "history": [["1", "2"]]},
    {"question": "q", "answer": "a"},
    {"prompt": "q", "completion": "a"},
    {"prompt": [Q], "completion": [A]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": [Q, A], "rejected": [Q, B]},
    {"conversations": [says("human", "q")], "chosen": says("gpt", "a"), "rejected": says("gpt", "b")},
    {"prompt": "q", "completion": "a", "label": True},
    {"messages": [Q, A], "kto_tag": True},
    {"messages": [Q, A]},
    {"conversations": [says("human", "q"), says("gpt", "a")]},
]


@pytest.mark.parametrize("fields", SHORTEST, ids=lambda fields: "-".join(fields))
@pytest.mark.parametrize("mapped", [False, True])
def test_what_every_conversation_may_have_beside_it(fields, mapped):
    extras = {"system": "s", "tools": TOOLS, "input": "i", "context": "c", "thinking": "t"}
    columns = {key: f"My {key}" for key in extras} if mapped else None
    fields = fields | {(columns or {}).get(key, key): value for key, value in extras.items()}
    form = recognize(rename(fields, columns, "here") if columns else fields, "here")
    row = to_row(fields, form, "here", columns)
    assert row and row.tools == TOOLS
    assert row.messages[0] == system("s")
    assert row.messages[-1] == bot("a", thinking="t")
    assert row.messages[-2] == user("q", input="i\n\nc")


def test_what_a_conversation_says_already_is_not_said_twice():
    """Data sets keep the columns that their messages were made from."""
    said = [user("Read this: some text. Then answer."), bot("Since x. a")]
    assert messages(*said, context="some text.", input="", thinking="Since x.") == said
    assert messages(Q, A, Q, A, context="c") == [user("q", input="c"), A, Q, A]


def test_columns_that_a_form_does_not_use():
    fields = {"q": "q", "a": "a", "t": "t", "h": None}
    for form, columns in (
        ("text", {"text": "t", "system": "a"}),
        ("alpaca", {"instruction": "q", "output": "a", "question": "t"}),
    ):
        with pytest.raises(UserError, match=r"--data\.columns (system|question)"):
            to_row(fields, form, "here", columns)
    columns = {"instruction": "q", "output": "a", "history": "h"}
    assert to_row(fields, "alpaca", "here", columns) == Row([Q, A]), "a mapping for other rows of the file"


def as_text(*said: dict) -> list[tuple[str, bool]]:
    """Answers, and whether they belong to the prompt."""
    return [(m["content"], bool(m.get("_context"))) for m in said if m["role"] == "assistant"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [Q, B, Q], "completion": "a"},
        {"prompt": [Q, B, Q], "completion": [A]},
        {"prompt": [Q, B, Q], "chosen": "a", "rejected": "c"},
        {"messages": [Q, B, Q], "chosen": A, "rejected": B},
        {"chosen": [Q, B, Q, A], "rejected": [Q, B, Q, bot("c")]},
        {"chosen": [Q, B, Q, A], "rejected": [Q, B, Q, A]},
        {"prompt": [Q, B, Q], "completion": "a", "label": 1},
        {"messages": [Q, B, Q, A], "label": True},
    ],
)
def test_answers_in_a_prompt_are_context(fields):
    row = convert(fields)[1]
    assert row and as_text(*row.messages) == [("b", True), ("a", False)]
    own = json.loads(json.dumps(fields).replace('"content": "b"', '"content": "b", "train": true'))
    row = convert(own)[1]
    assert row and as_text(*row.messages) == [("b", False), ("a", False)], "the row itself wants it trained"


@pytest.mark.parametrize(
    "fields", [{"messages": [Q, B, Q, A]}, {"instruction": "q", "output": "a", "history": [["q", "b"]]}]
)
def test_answers_in_a_conversation_are_answers(fields):
    row = convert(fields)[1]
    assert row and as_text(*row.messages) == [("b", False), ("a", False)]


def test_tools_as_texts():
    texts = [json.dumps(tool) for tool in TOOLS]
    assert convert({"messages": [Q, A], "tools": texts})[1] == Row([Q, A], TOOLS)


def test_which_messages_are_trained():
    said = messages(
        Q, bot("a", weight=0), Q, bot("a", weight=1), user("q", train=True), bot("a", train=False, weight=None)
    )
    assert [m.get("train") for m in said] == [None, False, None, True, True, False]
    assert all(type(m["train"]) is bool for m in said if "train" in m)
    assert "weight" not in said[1]


def test_what_follows_the_last_answer_is_cut_off():
    assert messages(Q, A, Q, {"role": "tool", "content": "3"}) == [Q, A]
    assert convert({"prompt": "q", "chosen": [A, Q], "rejected": "b"})[1] == Row([Q, A], goes_on=True)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"messages": [Q, A], "chosen": A, "rejected": B}, "preference"),
        ({"messages": [Q, A], "instruction": "q", "output": "a"}, "messages"),
        ({"messages": [Q, A], "conversations": None, "kto_tag": True}, "label"),
        ({"instruction": "q", "output": "a", "history": None}, "alpaca"),
        ({"instruction": "q", "output": None}, "alpaca"),
        ({"prompt": "q", "completion": "a", "text": "qa"}, "prompt_completion"),
        ({"question": "q", "answer": "a", "label": "geography"}, "question_answer"),
    ],
)
def test_which_form_wins(fields, form):
    assert recognize(fields, "here") == form


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("word", 'is text, not an object with instruction and output (as {"instruction": "..."'),
        (None, "is null, not an object with instruction and output"),
        ([1], "is a list, not an object with instruction and output"),
        ({}, "Found: no keys."),
        ({"instruction": "q", "label": True}, "Found: instruction, label."),
        ({"instructoin": "q", "b": 1}, "Found: instructoin, b. Did you mean 'instruction'?"),
        ({f"k{i}\n": 1 for i in range(1000)}, "k18, k19, ...."),
    ],
)
def test_not_recognized(fields, message):
    text = error(fields)
    assert message in text and len(text) < 1000
    if isinstance(fields, dict):
        assert all(f"{name} ({', '.join(form.keys)})" in text for name, form in FORMS.items())
        assert "--data.columns" in text


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("alpaca", ["a"], "is a list, not an object with instruction and output (as {"),
        ("messages", 3, "is a number, not an object with messages (as {"),
        ("alpaca", {"instruction": "q", "input": ""}, "is missing output. Found: instruction, input."),
        ("alpaca", {}, "is missing instruction and output. Found: no keys."),
        ("alpaca", {"instruction": "q", "output": 3}, "has output '3', which is a number"),
        ("alpaca", {"instruction": "q", "response": 3}, "has response '3', which is a number"),
        ("alpaca", {"instruction": "q", "output": None}, "has output 'None', which is null"),
        (
            "alpaca",
            {"instruction": "q", "output": "a", "input": ["\n"]},
            "has input \"['\\\\n']\", which is a list",
        ),
        ("alpaca", {"instruction": "q", "output": "a", "context": 1}, "has context '1', which is a number"),
        ("history", {"instruction": "q", "output": "a", "history": "x"}, "has history 'x', which is text"),
        ("history", {"instruction": "q", "output": "a", "history": [["1"]]}, "has history whose turn 1 is not a list"),
        ("history", {"instruction": "q", "output": "a", "history": [["1", 2]]}, "has turn 1 of history '2', which is"),
        ("question_answer", {"question": "q", "answer": True}, "has answer 'True', which is true or false"),
        ("prompt_completion", {"prompt": "q", "completion": 3}, "has completion that is a number"),
        ("prompt_completion", {"prompt": "q", "completion": []}, "has completion that is an empty list"),
        ("prompt_completion", {"prompt": "q", "completion": [Q]}, "has completion without an assistant message"),
        ("prompt_completion", {"prompt": ["q"], "completion": "a"}, "message 1 of prompt, is text, not an object with"),
        ("preference", {"chosen": "a", "rejected": "b"}, "is missing prompt"),
        ("preference", {"prompt": "q", "chosen": Q, "rejected": B}, "has chosen without an assistant message"),
        ("preference", {"prompt": "q", "chosen": 3, "rejected": B}, "has chosen that is a number"),
        ("label", {"messages": [Q, A], "label": "good"}, "has label 'good'. Expected true"),
        ("label", {"messages": [Q, A], "label": None, "kto_tag": 2}, "has kto_tag '2'. Expected true"),
        ("label", {"completion": "a", "label": True}, "is missing prompt. Found: completion, label."),
        ("text", {"text": 3}, "has text '3', which is a number"),
        ("text", {"text": "a\0"}, "has text with a NUL character (character 2)"),
        ("alpaca", {"instruction": "q\0", "output": "a"}, "has instruction with a NUL character (character 2)."),
        ("alpaca", {"instruction": "q", "output": "a\ud800"}, "has output with an unpaired surrogate (character 2)"),
        (
            "alpaca",
            {"instruction": "q", "output": "x" * 1_000_001},
            "has output of 1,000,001 characters",
        ),
    ],
)
def test_rows_that_cannot_be_used(form, fields, message):
    assert error(fields, form).startswith(message)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], "has no messages in messages"),
        ([Q, "a"], "message 2, is text, not an object with role and content."),
        ([Q, {"role": "assistnt", "content": "a"}], "message 2, has role 'assistnt'"),
        ([{"role": 3, "content": "a"}], "message 1, has role '3'"),
        ([Q, {"content": "a"}], "message 2, is missing role. Found: content."),
        ([Q, {"role": "assistant"}], "message 2, is missing content. Found: role."),
        ([Q, bot(None)], "message 2, has content 'None', which is null"),
        ([Q, bot(3)], "message 2, has content '3', which is a number"),
        ([says("human", 3), A], "message 1, has value '3', which is a number"),
        ([Q, Q], "has no assistant message"),
        (
            [user([{"type": "image_url", "image_url": {}}]), A],
            "message 1, has a part of its content that is of type 'im",
        ),
        ([user([{"type": "note", "text": "q"}]), A], "message 1, has a part of its content that is of type 'note'"),
        ([user(["q"]), A], "message 1, has a part of its content that is text"),
        ([user([{"type": "text", "text": "\0"}]), A], "message 1, has content with a NUL character"),
        ([Q, bot("\udc00")], "message 2, has content with an unpaired surrogate"),
        ([Q, bot("x" * 1_000_001)], "message 2, has content of 1,000,001 characters"),
        ([Q, bot("", tool_calls="x")], "message 2, has tool_calls that is text"),
        ([Q, bot("", tool_calls=[{"function": "add"}])], "message 2, has a tool call"),
        ([Q, bot("", tool_calls=["add"])], "message 2, has a tool call 'add'"),
        (
            [Q, bot("", tool_calls=[{"name": "add", "arguments": {"a": ["\0"]}}])],
            "message 2, has tool_calls with a NUL",
        ),
        ([Q, says("function_call", "add(1, 2)")], "message 2, has a tool call 'add(1, 2)'"),
        ([Q, bot("a", weight=0.5)], "message 2, has weight '0.5'"),
        ([Q, bot("a", train="yes")], "message 2, has train 'yes'"),
        ([Q, bot("a", name=3)], "message 2, has name '3', which is a number"),
        ([user("q", images=["a.png"]), A], "message 1, has images, and only text is supported. Remove images from"),
    ],
)
def test_messages_that_cannot_be_used(said, message):
    assert error({"messages": said}).startswith(message)


def test_only_text_is_trained_on():
    """An image is not left out silently, whatever the form of its row; an empty column says that there is none."""
    for row in ({"instruction": "q", "output": "a"}, {"messages": [Q, A]}, {"text": "t"}):
        for key in ("image", "images", "video", "audios"):
            assert error({**row, key: "a.png"}).startswith(f"has {key}, and only text is supported")
        assert to_row({**row, "images": [], "image": None}, recognize(row, ""), "") == to_row(
            row, recognize(row, ""), ""
        )
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "images": ["a.png"]}
    with pytest.raises(UserError, match="has images, and only text is supported"):
        to_sides(pair, "preference", "row 1", "pair")


def test_what_stands_beside_the_messages():
    assert error({"messages": "q"}).startswith("has messages 'q', which is text")
    assert error({"messages": None}).startswith("has no messages in")
    assert error({"messages": [Q, A], "tools": "add"}).startswith("has tools 'add', which is text")
    assert error({"messages": [Q, A], "tools": {"a": 1}}).startswith("has tools \"{'a': 1}\", which is an object")
    assert error({"messages": [Q, A], "tools": [{"\0": 1}]}).startswith("has tools with a NUL character")
    assert error({"messages": [Q, A], "system": 3}).startswith("has system '3', which is a number")
    assert error({"messages": [system("s"), Q, A], "system": "t"}).startswith("has system and")
    assert messages(system("s"), Q, A, system="s") == [system("s"), Q, A]
    assert "Did you mean 'assistant'?" in error({"messages": [Q, {"role": "assistnt", "content": "a"}]})


def test_no_such_form():
    with pytest.raises(UserError, match=r"--data.format alpca .* Did you mean 'alpaca'\?"):
        to_row({}, "alpca", "here")


def test_columns():
    columns = {"instruction": "Frage", "output": "Antwort"}
    fields = {"Frage": "q", "Antwort": "a", "output": "old", "input": "i"}
    assert rename(fields, columns, "here") == {"instruction": "q", "output": "a", "input": "i"}
    assert to_row(fields, "alpaca", "here", columns) == Row([user("q", input="i"), A])
    assert rename({"input": "i", "output": "o"}, {"input": "output", "output": "input"}, "here") == {
        "input": "o",
        "output": "i",
    }
    assert recognize(rename({"instruction": "q", "output": "a"}, {"text": "output"}, "here"), "here") == "text"
    message = "is missing Antwort, which --data.columns maps to output. Found: Frage, Antwrt. Did you mean 'Antwrt'?"
    assert error({"Frage": "q", "Antwrt": "a"}, "alpaca", columns=columns) == message
    assert error("q", "alpaca", columns=columns).startswith("is text, not an object with")
    with pytest.raises(UserError, match=r"--data.columns answr: .* Did you mean 'answer'\?"):
        rename(fields, {"answr": "Antwort"}, "here")


def test_rows_of_parquet(tmp_path):
    """Objects from Parquet have every key of the column, null where a row has none."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [
        {"messages": [Q, bot("a", weight=0), Q, bot(None, tool_calls=[{"id": "1", **CALL}]), A], "tools": TOOLS},
        {"messages": [Q, A]},
    ]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    made = [to_row(value, recognize(value, where), where) for where, value in read_rows(tmp_path / "a.parquet")]
    calls = bot("", tool_calls=[{"id": "1", **CALL}])
    assert made == [Row([Q, bot("a", train=False), Q, calls, A], TOOLS), Row([Q, A])]


UNLIKE: list[dict] = [  # objects that one column of a table gives one type
    {
        "messages": [Q, bot("", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Rome"}}}])],
        "tools": [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}],
    },
    {
        "messages": [Q, bot("", tool_calls=[{"function": {"name": "add", "arguments": {"n": 3, "at": {"x": 1}}}}])],
        "tools": [{"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "number"}}}}],
    },
    {"messages": [Q, A], "tools": None},
]


@pytest.mark.parametrize("place", ["parquet", "hub"])
def test_unlike_objects_in_a_table_are_not_padded(place, tmp_path, monkeypatch):
    if place == "parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist(UNLIKE), tmp_path / "a.parquet")
        found = list(read_rows(tmp_path / "a.parquet"))
    else:
        made = pytest.importorskip("datasets").Dataset.from_list(UNLIKE)
        monkeypatch.setattr("litgpt.data.sources.hub_data_set", lambda path: made)
        found = list(RowSource("hf:a/b").rows())
        assert "city" in made[1]["messages"][1]["tool_calls"][0]["function"]["arguments"], "padded in the table"
    assert [to_row(value, "messages", where) for where, value in found] == [
        to_row(value, "messages", "here") for value in UNLIKE
    ]


@pytest.mark.parametrize(
    ("name", "form", "n", "n_left_out", "roles"),
    [
        ("alpaca_13k.json", "alpaca", 13354, 0, {"user": 13354, "assistant": 13354}),
        ("alpaca_en_demo.json", "alpaca", 999, 0, {"user": 999, "assistant": 999}),
        ("dolly_3k.json", "alpaca", 2996, 0, {"user": 2996, "assistant": 2996}),
        ("identity.json", "alpaca", 91, 0, {"user": 91, "assistant": 91}),
        ("instructions_1100.json", "alpaca", 1100, 0, {"user": 1100, "assistant": 1100}),
        ("lima.json", "history", 1029, 0, {"user": 1082, "assistant": 1082}),
        ("sharegpt_dummy.json", "sharegpt", 500, 0, {"user": 1000, "assistant": 1000}),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300, 0, {"user": 746, "assistant": 957, "tool": 211}),
        ("dpo_en_demo.json", "preference", 300, 0, {"system": 80, "user": 563, "assistant": 563}),
        ("kto_en_demo.json", "label", 150, 150, None),
        ("gsm8k_train.jsonl", "question_answer", 7473, 0, {"user": 7473, "assistant": 7473}),
        ("wikisql_train.jsonl", "text", 1000, 0, {}),
    ],
)
def test_real_files(real_data, name, form, n, n_left_out, roles):
    pairs = [(where, value) for where, value in read_rows(real_data / "instruct" / name)]
    assert {recognize(value, where) for where, value in pairs} == {form}
    made = [to_row(value, form, where) for where, value in pairs]
    rows = [row for row in made if row]
    assert (len(rows), made.count(None)) == (n, n_left_out)
    assert roles is None or Counter(m["role"] for row in rows for m in row.messages) == roles
    assert all(row.text if form == "text" else row.messages[-1]["role"] == "assistant" for row in rows)
    if name.startswith("glaive"):
        calls = [m["tool_calls"] for row in rows for m in row.messages if "tool_calls" in m]
        assert len(calls) == 211 and all(isinstance(c[0]["function"]["arguments"], dict) for c in calls)
        assert all(c[0]["function"]["name"] for c in calls)
        assert sum(row.tools is not None for row in rows) == sum(value["tools"] != "[]" for _, value in pairs) > 0
