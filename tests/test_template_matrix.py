"""Chat templates behave as in `transformers`: over the templates that `trl` ships and those of real tokenizers, with
conversations of many kinds, the token IDs, the trained tokens and the refusals are the same.

Where litgpt differs, it does so on purpose:

- Tool calls get the form that the template can show, so `transformers` is given that form too.
- What the generation prompt writes is not trained, unless the template marks it. What a template writes between that
  and the answer is trained.
- What the template writes after a stop token, such as a line break, is not trained. The stop token always is.
- If no stop token follows the last answer, EOS does.
"""

import importlib.util
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from litgpt.data.forms import Row, to_row
from litgpt.data.json_file import JSON
from litgpt.data.lost import Lookup
from litgpt.data.tokens import IN_LOSS
from litgpt.errors import UserError
from litgpt.text.chat_template import ChatTemplate, call_in
from litgpt.text.prompts import checkpoint_template, template_variables
from litgpt.text.tokenizer import Tokenizer

TRL = importlib.util.find_spec("trl")  # only its template files are used, so it is never imported
TEMPLATES = Path(TRL.origin if TRL and TRL.origin else "none").parent / "chat_templates"
NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
TRAINING = "_training"
needs_trl = pytest.mark.skipif(not NAMES, reason="trl, whose chat templates are compared, is not installed")
QUICK = ("qwen3", "llama3_1", "gptoss", "deepseekv3_training")
IMAGES = ("llava_next", "llava_next_training")  # they refuse all content that is a text
CONTROL = (  # how templates write control tokens
    r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|\[/?INST\]|\[gMASK\]|<sop>|</?think>"
    r"|<\|?turn\|?>|<\|?channel\|?>|<\|?tool(?:_call|_response)?\|?>"
)


# conversations


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def says(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def result(content: str, role: str = "tool", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SYSTEM = {"role": "system", "content": "Be kind."}
PROPERTIES = {
    "city": {"type": "string", "description": "Where.", "enum": ["Röm", "Oslo"]},
    "days": {"type": "integer", "description": "How many.", "default": 1},
    "units": {"type": "array", "items": {"type": "string"}, "nullable": True},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": PROPERTIES, "required": ["city"]},
    },
}
ROME, OSLO = {"city": "Röm", "days": 2, "units": ["C", "<F>"]}, {"city": "Oslo"}
TWO_TURNS = [user("Hi?"), says("Hello."), user("And?"), says("Bye.")]
Conversation = tuple[list[dict[str, Any]], Any]  # messages and tools
CONVERSATIONS: dict[str, Conversation] = {
    "one turn": (TWO_TURNS[:2], None),
    "two turns": (TWO_TURNS, None),
    "the same words": ([user("yes"), says("yes")] * 2, None),
    "an empty answer": ([user("Hi?"), says(""), *TWO_TURNS[2:]], None),
    "system": ([SYSTEM, *TWO_TURNS], None),
    "developer": ([{**SYSTEM, "role": "developer"}, *TWO_TURNS], None),
    "blanks": ([SYSTEM, user(" Hi?\n"), says(" Hello.\n"), user("And? "), says("\n\nBye. ")], None),
    "tools": (TWO_TURNS[:2], [TOOL]),
    "tools as one text": ([SYSTEM, *TWO_TURNS], json.dumps([TOOL])),
    "tools as texts": ([SYSTEM, *TWO_TURNS], [json.dumps(TOOL)]),
    "null content": ([user("Rain?"), says(None, tool_calls=[call(ROME)]), result("23"), says("Yes.")], [TOOL]),
    "ends with a call": ([user("Rain?"), says("", tool_calls=[call(ROME)])], [TOOL]),
    "parallel calls": (
        [
            user("Rain?"),
            says("", tool_calls=[call(ROME, id="call00001"), call(OSLO, id="call00002")]),
            result("23", tool_call_id="call00001"),
            result("5", tool_call_id="call00002"),
            says("In both."),
        ],
        [TOOL],
    ),
    "calls in turn": (
        [
            user("Rain?"),
            *[says("", tool_calls=[call(ROME)]), result("23")],
            *[says("", tool_calls=[call(OSLO)]), result("5"), says("In both."), user("More?")],
            *[says("", tool_calls=[call({})]), result('{"n": 1}'), says("No.")],
        ],
        [TOOL],
    ),
    "calls without tools": ([user("Rain?"), says("", tool_calls=[call(OSLO)]), result("5"), says("Yes.")], None),
    "thought in the content": ([user("Hi?"), says("<think>\nfirst\n</think>\n\nHello."), *TWO_TURNS[2:]], None),
    "unknown fields": ([user("Hi?", name="Ann", x=["y"]), says("Hello.", score=1, refusal=None), *TWO_TURNS[2:]], None),
    "the assistant begins": ([says("Hello."), *TWO_TURNS[2:]], None),
    "two prompts": ([user("Hi?"), *TWO_TURNS[2:]], None),
    "two answers": ([*TWO_TURNS[:2], says("Bye.")], None),
    "a late system message": ([*TWO_TURNS[:2], SYSTEM, *TWO_TURNS[2:]], None),
    "a result without a call": ([user("Hi?"), result("23"), says("Bye.")], None),
    "control tokens": ([user("<|im_end|>"), says("a <|end|> b <|im_end|> c"), user("q"), says("<|eot_id|>")], None),
}
for form, arguments in (("object", ROME), ("text", json.dumps(ROME)), ("words", "in Rome")):
    asked = [user("Rain?"), says("", tool_calls=[call(arguments, id="call00001")])]
    CONVERSATIONS[f"a call, {form}"] = (
        [*asked, result("23", tool_call_id="call00001", name="weather"), says("It will.")],
        [TOOL],
    )
    asked = [SYSTEM, user("Rain?"), says("I look.", tool_calls=[call(arguments)])]
    CONVERSATIONS[f"a call with words, {form}"] = (
        [*asked, result("23", "ipython"), says("It will."), *TWO_TURNS[2:]],
        [TOOL],
    )
for key in ("reasoning_content", "thinking", "reasoning"):
    CONVERSATIONS[f"{key}, one turn"] = ([user("Hi?"), says("Hello.", **{key: "first"})], None)
    CONVERSATIONS[f"{key}, two turns"] = (
        [SYSTEM, user("Hi?"), says("Hello.", **{key: "first"}), user("And?"), says("Bye.", **{key: "then"})],
        None,
    )
    CONVERSATIONS[f"{key}, call"] = (
        [
            user("Rain?"),
            says("", tool_calls=[call(OSLO)], **{key: "first"}),
            result("5"),
            says("Yes.", **{key: "then"}),
        ],
        [TOOL],
    )
SOME = ("system", "parallel calls", "calls in turn", "thinking, two turns", "reasoning, call", "two answers")


# comparison


class Pair(NamedTuple):
    """A folder as `transformers` and litgpt read it."""

    theirs: Any
    ours: Tokenizer
    style: ChatTemplate

    @property
    def stop(self) -> Optional[str]:
        return self.style.turn_end(self.ours.special_tokens)

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with their tool calls in the form that the template can show."""
        made = []
        for message in messages:
            if message.get("tool_calls"):
                form = self.style.call_form
                kept = {k: v for k, v in message.items() if k != "content" or v}
                message = {**form.empty, **kept, "tool_calls": [call_in(form, c) for c in message["tool_calls"]]}
            made.append(message)
        return made

    def text(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> str:
        """The text by `transformers`."""
        messages = self.messages(messages)
        if all(m.get("content", "") is not None for m in messages):
            return self.theirs.apply_chat_template(messages, tools, tokenize=False, **options)
        options = {"chat_template": self.theirs.chat_template, **self.theirs.special_tokens_map, **options}
        return render_jinja_template([messages], tools, **options)[0][0]  # `apply_chat_template` drops the null

    def ids(self, row: Row) -> list[int]:
        """The token IDs by `transformers`."""
        messages = self.messages(row.messages)
        if any(m.get("content", "") is None for m in messages):
            return self.theirs(self.text(row.messages, row.tools), add_special_tokens=False)["input_ids"]
        return self.theirs.apply_chat_template(messages, row.tools, return_dict=False)

    def marks(self, row: Row, template: str) -> tuple[list[int], list[int]]:
        """The token IDs and the mask that another template writes."""
        found = self.theirs.apply_chat_template(
            self.messages(row.messages), row.tools, chat_template=template, return_assistant_tokens_mask=True
        )
        return found["input_ids"], found["assistant_masks"]


def open_pair(folder: Path) -> Pair:
    style = checkpoint_template(folder)
    assert style is not None
    return Pair(AutoTokenizer.from_pretrained(folder), Tokenizer(folder), style)


@pytest.fixture
def pair_of(tokenizer_file: Path, tmp_path: Path) -> Callable[[str], Pair]:
    """A tiny tokenizer with a template of `trl` and its control tokens, saved by `transformers`."""

    def make(name: str) -> Pair:
        template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        made = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>")
        made.add_special_tokens({"additional_special_tokens": sorted(set(re.findall(CONTROL, template)))})
        made.chat_template = template
        made.save_pretrained(tmp_path / name)
        return open_pair(tmp_path / name)

    return make


def rows_of(conversations: dict[str, Conversation]) -> Iterator[tuple[str, dict[str, Any], Row]]:
    for name, (messages, tools) in conversations.items():
        fields = {"messages": messages, "tools": tools}
        row = to_row(fields, "messages", name)
        assert row is not None
        yield name, fields, row


CALL_ENDS = "<|tool_response>"  # written after a call at the end of a conversation, as the token to stop at


def compare(pair: Pair, conversations: dict[str, Conversation], path: Path, marked: Optional[str] = None) -> int:
    """Compare the training path with `transformers`, and return the number of conversations that both accept.

    Args:
        marked: A template that writes the same texts and marks what is trained in them.
    """
    accepted = []
    for name, fields, row in rows_of(conversations):
        compare_prompts(pair, row, name)
        try:
            accepted.append((name, fields, row, pair.ids(row)))
        except Exception:
            with pytest.raises(UserError):
                pair.style.render_row(row.messages, row.tools, pair.stop)
    if not accepted:
        return 0
    path.write_text(json.dumps([fields for _, fields, _, _ in accepted]))
    loaded = JSON(str(path), val_split_fraction=0).load(pair.ours, pair.ours.folder, 100_000)
    assert loaded.style == pair.style and len(loaded.train) == len(accepted)
    for i, (name, _, row, expected) in enumerate(accepted):
        ids, mask = loaded.train.row(i)
        trained = (mask & IN_LOSS).bool().tolist()
        assert ids.tolist() == expected or (ids.tolist() == [*expected, pair.ours.eos_id] and trained[-1]), name
        check_words(pair, row, name, ids.tolist(), trained)
        if marked is not None:
            same: list[int] = []
            with suppress(Exception):  # the variant of a template may refuse more
                same, marks = pair.marks(row, marked)
            if same == expected:
                compare_masks(pair, row, name, expected, trained[: len(expected)], marks)
    return len(accepted)


def compare_prompts(pair: Pair, row: Row, name: str) -> None:
    """Before each answer, chat and training show the model the same prompt as `transformers`, or both refuse it."""
    for i, message in enumerate(row.messages):
        if message["role"] == "assistant" and i > 0:
            try:
                expected = pair.text(row.messages[:i], row.tools, add_generation_prompt=True)
            except Exception:
                with pytest.raises(UserError):
                    pair.style.prompt(row.messages[:i], row.tools)
            else:
                assert pair.style.prompt(row.messages[:i], row.tools) == expected, name


def check_words(pair: Pair, row: Row, name: str, ids: list[int], trained: list[bool]) -> None:
    """Of the words in a conversation, those of the assistant are trained and no others are."""
    shown = pair.theirs.decode([i for i, on in zip(ids, trained) if on])
    lost = Lookup(pair.style).lost(row.messages, row.tools)
    for message in row.messages:
        words = message["content"].rpartition("</think>")[2].strip()
        if message["role"] == "assistant":
            assert words in shown or "answers" in lost, f"{name}: {words!r} is not in {shown!r}"
        elif name not in ("the same words", "control tokens"):
            assert words not in shown, f"{name}: {words!r} is in {shown!r}"


def compare_masks(pair: Pair, row: Row, name: str, ids: list[int], trained: list[bool], marks: list[int]) -> None:
    """Trained are the marked tokens, apart from the differences that the module names."""
    theirs, style = pair.theirs, pair.style
    own_marks = "endgeneration" in style.template
    prompts = []
    for i, message in enumerate(row.messages):
        if message["role"] == "assistant":
            with suppress(UserError):
                prompts.append(style.prompt(row.messages[:i], row.tools))
    stop = theirs.convert_tokens_to_ids(pair.stop) if pair.stop else None
    after_stop, start = False, 0
    for (ours, mark), group in groupby(zip(trained, marks)):
        n = len(list(group))
        text, context = theirs.decode(ids[start : start + n]), theirs.decode(ids[:start])
        if ours and not mark:
            allowed = ids[start:][:n] == [stop] or text == CALL_ENDS or context in prompts
            assert allowed, f"{name}: only trained: {text!r} after {context[-80:]!r}"
        if mark and not ours:
            opens = context + text in prompts or text in style.opening
            allowed = after_stop or (opens and not own_marks)
            assert allowed, f"{name}: only marked: {text!r} after {context[-80:]!r}"
        start += n
        after_stop = bool(ours) and ids[start - 1] == stop


def training_variant(name: str) -> Optional[str]:
    """The template of `trl` that marks what is trained: the template itself or its variant."""
    file = TEMPLATES / f"{name.removesuffix(TRAINING)}{TRAINING}.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


@needs_trl
@pytest.mark.parametrize("name", QUICK)
def test_some_templates(name, pair_of, tmp_path):
    some = {key: CONVERSATIONS[key] for key in SOME}
    assert compare(pair_of(name), some, tmp_path / "rows.json", training_variant(name)) >= 3


@needs_trl
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_all_templates(name, pair_of, tmp_path):
    assert compare(pair_of(name), CONVERSATIONS, tmp_path / "rows.json", training_variant(name)) >= 10 * (
        name not in IMAGES
    )


def random_conversation(rng: random.Random) -> Conversation:
    """Turns with calls, reasoning, and words of which none occurs twice."""
    words = (f"w{n}w" for n in rng.sample(range(1000, 10000), 99))

    def answer(content: str, **more: Any) -> dict[str, Any]:
        thought = {rng.choice(["thinking", "reasoning", "reasoning_content"]): next(words)}
        return says(content, **more, **(thought if rng.random() < 0.4 else {}))

    messages = [{**SYSTEM, "content": next(words)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 4)):
        messages.append(user(next(words)))
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            ids = [f"call{next(words)[1:-1]}0" for _ in range(rng.choice([1, 1, 2]))]
            calls = [call(rng.choice([{}, {"city": next(words)}, {**ROME, "city": next(words)}]), id=i) for i in ids]
            messages.append(answer(rng.choice(["", next(words)]), tool_calls=calls))
            messages += [result(next(words), tool_call_id=i) for i in ids]
        messages.append(answer(next(words) + rng.choice(["", " ", " x", "\n"])))
    return messages, rng.choice([None, [TOOL]])


@needs_trl
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_random_conversations(name, pair_of, tmp_path):
    rng = random.Random(name)
    compare(
        pair_of(name),
        {f"random {i}": random_conversation(rng) for i in range(20)},
        tmp_path / "rows.json",
        training_variant(name),
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama-2", "llama-3-8b-instruct", "qwen2.5", "phi-3", "smollm2", "minimind"])
def test_real_tokenizers(name, real_data, tmp_path):
    same = {"llama-3-8b-instruct": "llama3", "qwen2.5": "qwen2_5"}.get(name)
    pair = open_pair(real_data / "tokenizers" / name)
    marked = training_variant(same) if same and NAMES else None
    assert compare(pair, CONVERSATIONS, tmp_path / "rows.json", marked) >= 10


@needs_trl
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_form_of_calls(name, pair_of):
    """Arguments are objects, as `transformers` recommends, unless the template joins them with other texts."""
    joins = name.startswith("deepseek") and name != "deepseekv3_training"
    assert pair_of(name).style.call_form.as_text == joins


VARIABLES: list[dict[str, Any]] = [
    {"enable_thinking": False},
    {"enable_thinking": True, "preserve_thinking": True},
    {"reasoning_effort": "high", "model_identity": "You are a test.", "builtin_tools": ["python", "browser"]},
    {"date_string": "1 Jan 2026", "tools_in_user_message": False, "thinking": True, "documents": [{"text": "x"}]},
]


@needs_trl
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_variables(name, pair_of):
    """Templates read further variables, which `transformers` takes as keyword arguments."""
    pair = pair_of(name)
    n = 0
    for variables in VARIABLES:
        style = pair.style.with_variables(variables)
        for key, _, row in rows_of({key: CONVERSATIONS[key] for key in SOME}):
            for messages, add in ((row.messages, False), (row.messages[:-1], True)):
                try:
                    expected = pair.text(messages, row.tools, add_generation_prompt=add, **variables)
                except Exception:
                    with pytest.raises(UserError):
                        style.render(messages, add, row.tools)
                    continue
                assert style.render(messages, add, row.tools) == expected, (key, variables)
                n += 1
    assert n >= 4 or name in IMAGES


# marks


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}BODY</s>{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}", ["Hello.</s>", "Bye.</s>"]),
        (
            "{% generation %}<think>{% endgeneration %} x {% generation %}{{ m.content }}{% endgeneration %}",
            ["<think>", "Hello.</s>", "<think>", "Bye.</s>"],
        ),
        ("{{ m.content }}{% if loop.last %}{% generation %}!{% endgeneration %}{% endif %}", ["!</s>"]),
        (
            "{% if loop.last %}{{ m.content }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}",
            ["Hello.</s>", ""],
        ),
        ("{% generation %}{% endgeneration %}{{ m.content }}", ["Hello.</s>", "Bye.</s>"]),
        ("{% if m.x %}{% generation %}x{% endgeneration %}{% endif %}{{ m.content }}", ["Hello.</s>", "Bye.</s>"]),
        (
            "{% set t %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %} {{ t }}",
            [" Hello.</s>", " Bye.</s>"],
        ),
    ],
)
def test_marked_parts(body, expected):
    """What is marked is trained, with the stop token. If nothing is, or nobody knows where, the answers are."""
    text, answers = ChatTemplate(MARKED.replace("BODY", body), {}).render_row(TWO_TURNS, None, "</s>")
    assert [text[start:end] for start, end, _ in answers] == expected
    assert {i for *_, i in answers} <= {1, 3}


# the language

TOKEN = {"__type": "AddedToken", "content": "<s>", "special": True}
EXPRESSIONS = """
{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}
{% set ns = namespace(_x=1) %}
{% set ns = namespace(x=1) %}{% set ns._x = 2 %}
{% set ns = namespace({'a': 1}, self=2) %}{{ ns.a }}{{ ns.self }}{{ ns.b is defined }}
{{ dict(a=1) }}{{ dict.fromkeys([1, 2], 3) }}
{{ tools[0] | tojson(true, 2, none, true) }}{{ tools | tojson(separators=[',', ':'], sort_keys=true) }}
{{ missing | tojson }}
{{ missing.a }}
{{ missing }}{{ messages[9] }}{{ messages[0].nope }}
{{ messages[0].nope.x }}
{{ messages[::-1] | map(attribute='role') | join(',') }}{{ messages[0].content[:2] }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | groupby('role') | list | length }}
{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ loop.previtem is defined }}{{ loop.nextitem.role }}{% endfor %}
{% for m in messages if m.role == 'user' %}{% if loop.first %}{% continue %}{% endif %}{{ loop.revindex }}{% endfor %}
{% macro f(a, b=2) %}[{{ a }}{{ b }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}{% call f(3) %}x{% endcall %}
{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + 1 %}{% endfor %}{{ x }}
{{ messages.append(1) }}
{{ messages[0].update({'a': 1}) }}
{{ messages[0].pop('role') }}
{% do messages.append(1) %}
{{ 'a' ~ 1 ~ none ~ true }}{{ 1 / 2 }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ -7 % 3 }}{{ '%s-%d' % ('a', 3) }}
{{ '<b>' | escape }}{{ '<b>' | safe }}{{ '<b>' | string }}{{ 'a b' | urlencode }}{{ ['b', 'A'] | sort }}
{{ messages is iterable }}{{ messages[0] is mapping }}{{ 1 is number }}{{ none is none }}{{ 'a' in 'abc' }}
{{ [1, 2.0, 'a', none] }}{{ {'a': 1, 'b': [true]} }}{{ (1, 2) }}{{ tools | length }}{{ documents is none }}
  {% if true %} a {% endif -%}  b {#- comment #} c
{% include 'x' %}
{% import 'x' as y %}
{{ raise_exception('no') }}
{% generation %}{{ loop }}{% endgeneration %}
{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}{% endgeneration %}{% endfor %}
{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}
{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}
{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}
{% set ns = namespace(a=1) %}{% generation %}{% set ns.a = 2 %}{% endgeneration %}{{ ns.a }}
{{ messages[0].content.__class__ }}
{{ ''.__class__.__mro__ }}
{{ messages | first | attr('role') }}{{ messages[0].get('zz', 'd') }}{{ messages[0].keys() | list }}
{{ 'a' if false }}{{ [] or 'x' }}{{ not [] }}{{ 'x' * 3 }}{{ [0] * 3 }}{{ 'abc'.removeprefix('a') }}
"""  # noqa: E501


@pytest.mark.parametrize("source", EXPRESSIONS.strip("\n").split("\n"))
def test_the_language_of_templates(source):
    """Each expression makes the same text, or both refuse it."""
    try:
        expected = render_jinja_template([TWO_TURNS], [TOOL], chat_template=source)[0][0]
    except Exception:
        with pytest.raises(UserError):
            ChatTemplate(source, {}).render(TWO_TURNS, False, [TOOL])
    else:
        assert ChatTemplate(source, {}).render(TWO_TURNS, False, [TOOL]) == expected


@pytest.mark.parametrize(
    "kind", ["LlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", None]
)
def test_special_tokens_in_templates(kind, request, llama, tmp_path):
    """Those of the files, else those of the tokenizer's class; null means none."""
    is_llama = kind == "LlamaTokenizer"  # this class needs a tokenizer made from sentencepiece
    source = request.getfixturevalue("real_data") / "tokenizers" / "llama-2" if is_llama else llama
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    cases: list[dict[str, Any]] = [{}, dict.fromkeys(names), {"bos_token": "<a>", "unk_token": TOKEN}]
    cases += [{**case, "added_tokens_decoder": {}} for case in cases]
    for i, fields in enumerate(cases):
        shutil.copytree(source, folder := tmp_path / str(i))
        named = {"tokenizer_class": kind} if kind else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields | named))
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<b>", "sep_token": "<c>"}))
        assert template_variables(folder) == AutoTokenizer.from_pretrained(folder).special_tokens_map


# single templates


def trained_texts(pair: Pair, messages: list[dict[str, Any]], tools: Any, path: Path) -> list[str]:
    """The trained parts of a row, in order."""
    path.write_text(json.dumps([{"messages": messages, "tools": tools}]))
    loaded = JSON(str(path), val_split_fraction=0).load(pair.ours, pair.ours.folder, 100_000)
    ids, mask = loaded.train.row(0)
    groups = groupby(zip(ids.tolist(), (mask & IN_LOSS).bool().tolist()), key=lambda part: part[1])
    return [pair.ours.decode([i for i, _ in group], skip_special=False) for on, group in groups if on]


@needs_trl
@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_the_analysis_of_gpt_oss_is_trained(key, pair_of, tmp_path):
    """Up to the last answer its template drops it, so that is not trained."""
    pair, path = pair_of("gptoss"), tmp_path / "rows.json"
    final = "<|channel|>final<|message|>"
    first = [user("Hi?"), says("Hello.", **{key: "one"})]
    analysis = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
    assert trained_texts(pair, first, None, path) == [f"{analysis.format('one')}{final}Hello.<|return|>"]
    more = [*first, user("And?"), says("Bye.", **{key: "two"})]
    assert trained_texts(pair, more, None, path) == [
        f"{final}Hello.<|end|>",
        f"{analysis.format('two')}{final}Bye.<|return|>",
    ]
    asks = [user("Rain?"), says("", tool_calls=[call(OSLO)], **{key: "one"})]
    shown = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    [found] = trained_texts(pair, asks, [TOOL], path)
    assert found.startswith(analysis.format("one") + shown)
    twice = [*asks, result("5"), says("", tool_calls=[call(OSLO)]), result("5"), says("Yes."), *asks, result("5")]
    texts = trained_texts(pair, [*twice, says("No.")], [TOOL], path)
    assert texts == [shown, shown, f"{final}Yes.<|end|>", shown, f"{final}No.<|return|>"]
    answered = [*asks, result("5"), says("Yes.", **{key: "two"})]
    assert trained_texts(pair, answered, [TOOL], path) == [shown, f"{analysis.format('two')}{final}Yes.<|return|>"]


@needs_trl
def test_the_results_of_ipython(pair_of, tmp_path):
    """Llama 3.1 names the role of tools so."""
    pair = pair_of("llama3_1")
    messages = [user("Rain?"), says("", tool_calls=[call(OSLO)]), result("5", "ipython"), says("Yes.")]
    row = to_row({"messages": messages}, "messages", "row")
    assert row is not None and row.messages[2]["role"] == "tool"
    expected = pair.theirs.apply_chat_template(messages, tokenize=False)
    assert pair.style.render(row.messages, False) == expected
    assert '<|start_header_id|>ipython<|end_header_id|>\n\n"5"<|eot_id|>' in expected
    call_text = '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
    assert trained_texts(pair, messages, None, tmp_path / "rows.json") == [call_text, "Yes.<|eot_id|>"]


@needs_trl
def test_words_behind_the_results_of_calls(pair_of, tmp_path):
    """Gemma 4 writes the words of an answer with calls behind the results, and its own notation of arguments."""
    pair = pair_of("gemma4_v5")
    messages = [user("5"), says("5", tool_calls=[call(OSLO)]), result("5"), says("5"), user("5"), says("5")]
    written = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>' + CALL_ENDS
    found = trained_texts(pair, messages, [TOOL], tmp_path / "rows.json")
    assert found == [written, "55<turn|>", "5<turn|>"]  # two answers side by side in one turn, and another


@needs_trl
@pytest.mark.parametrize(
    ("name", "stop"),
    [("cohere2", "<|END_OF_TURN_TOKEN|>"), ("gptoss", "<|return|>"), ("glm4moe", "<|user|>"), ("phi3", "<|end|>")],
)
def test_stop_tokens(name, stop, pair_of):
    assert pair_of(name).stop == stop


# special tokens in texts


TEXTS = [
    "a <s> b</s> <|im_end|>x<|eot_id|> <|endoftext|> <think>c<|end|>",
    "</s>",
    "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
]


def with_split(source: Path, folder: Path, value: Any) -> Path:
    shutil.copytree(source, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": value}))
    return folder


def compare_ids(folder: Path) -> list[list[int]]:
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in TEXTS:
        for special in (False, True):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special=special) == expected
            assert ours.encode_batch([text], [special])[0].ids == expected
    if theirs.chat_template:
        style = checkpoint_template(folder)
        assert style is not None
        expected = theirs.apply_chat_template(TWO_TURNS, return_dict=False)
        assert ours.encode(style.render(TWO_TURNS, False), special=False) == expected
    return [ours.encode(text, special=False) for text in TEXTS]


@pytest.mark.parametrize("value", [True, False])
def test_special_tokens_are_split(value, llama, tmp_path):
    """`split_special_tokens` makes special tokens in a text plain text, those of the chat template too."""
    folder = with_split(llama, tmp_path / "m", value)
    assert ([1] in compare_ids(folder)) == (not value)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["llama-2", "llama-3-8b-instruct", "qwen2.5", "phi-3", "smollm2", "minimind", "pythia"]
)
def test_special_tokens_of_real_tokenizers_are_split(name, real_data, tmp_path):
    source = real_data / "tokenizers" / name
    split = compare_ids(with_split(source, tmp_path / "split", True))
    assert split != compare_ids(with_split(source, tmp_path / "whole", False))


def test_special_tokens_of_sentencepiece_are_split(real_data, tmp_path):
    folder = with_split(real_data / "tokenizers" / "llama-2", tmp_path / "m", True)
    expected = compare_ids(folder)
    (folder / "tokenizer.json").unlink()
    ours = Tokenizer(folder)
    assert [ours.encode(text, special=False) for text in TEXTS] == expected
