"""The forms that a row of a data set may have, recognised from its keys, and their way into messages."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Optional, Union

from litgpt.errors import UserError, kind, nearest
from litgpt.storage.files import parse_json
from litgpt.text.chat_template import REASONING

MAX_CHARACTERS = 1_000_000

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "gemini", "claude", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # the content is the call
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
EXAMPLES = {
    "instruction": '{"instruction": "...", "input": "...", "output": "..."}',
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "conversations": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
}
TEXTS = ("name", "tool_call_id")  # fields of a message that must be text
READ = ("role", "from", "content", "value", "tool_calls", "function_call", "weight", "train")  # by `message` itself
SHARED = ("system", "tools", "input", "context", *REASONING)  # what a conversation of any form may have beside it


@dataclass
class Row:
    """A conversation that ends with the assistant, or a plain text.

    Args:
        messages: Each has `role` (system, user, assistant or tool) and `content`, a text. A user's message may have
            `input`, a text that belongs to it; an assistant's may have `tool_calls` in OpenAI's form, with the
            arguments as an object. Any message may have `train`, true or false, and further fields as the file has
            them. An assistant's message with `_context` belongs to the prompt.
        tools: What the assistant may call, as the file has it.
        text: Instead of messages, a plain text, all of it trained.
    """

    messages: list[dict[str, Any]]
    tools: Optional[list[Any]] = None
    text: Optional[str] = None


@dataclass(frozen=True)
class Form:
    """How a form of rows is recognised and read.

    Args:
        keys: What a row of this form must have; `a|b` is satisfied by either key.
        read: Makes the messages of an object that has these keys, or its text; None if the row is to be skipped.
        also: Further keys that `read` reads, beside those that every conversation may have.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Union[list[dict[str, Any]], str, None]]
    also: tuple[str, ...] = ()

    def lacking(self, present: Any) -> list[str]:
        return [key.split("|")[0] for key in self.keys if not any(k in present for k in key.split("|"))]

    def uses(self, key: str) -> bool:
        """Whether a row of this form is made from this key."""
        own = [k for several in self.keys for k in several.split("|")]
        return key in (*own, *self.also) or (own != ["text"] and key in SHARED)


def recognise(fields: Any, where: str) -> str:
    """The name of the form of a row. A key whose value is null counts only where no form is found without it.

    Args:
        fields: The row, with its keys renamed.
        where: Where it stands, as `read_rows` says it; the error begins with it.

    Raises:
        UserError: the row is of no known form; its keys and the known forms with theirs are shown.
    """
    check_object(fields, where, "instruction and output")
    filled = {key for key, value in fields.items() if value is not None}
    for present in (filled, fields):
        for name, form in FORMS.items():
            if not form.lacking(present):
                return name
    hint = next((h for k in fields if k not in KEYS and (h := nearest(str(k), KEYS))), "")
    known = "; ".join(f"{name} ({', '.join(form.keys)})" for name, form in FORMS.items())
    raise UserError(
        f"{where}, is of no known form; it has {key_names(fields)}.{hint} The forms are: {known}. "
        "--data.columns says which of the file's keys stands for which of these."
    )


def to_row(fields: Any, form: str, where: str, columns: Optional[Mapping[str, str]] = None) -> Optional[Row]:
    """A row of the file as a conversation or a text.

    Args:
        fields: The row as the file has it.
        form: A name of `FORMS`.
        where: Where it stands, as `read_rows` says it; errors begin with it.
        columns: As for `rename`.

    Returns:
        The row; None if it is meant to be left out, as its `label` is false.

    Raises:
        UserError: the row is not of that form, or a text in it cannot be trained.
    """
    if form not in FORMS:
        raise UserError(f"There is no form {form!r}; the forms are {', '.join(FORMS)}.{nearest(form, FORMS)}")
    needed = " and ".join(key.split("|")[0] for key in FORMS[form].keys)
    check_object(fields, where, needed)
    if columns:
        fields = rename(fields, columns, where)
    missing = FORMS[form].lacking(fields)
    if missing:
        raise UserError(f"{where}, lacks {' and '.join(missing)}; it has {key_names(fields)}.")
    unused = [key for key in columns or () if fields.get(key) is not None and not FORMS[form].uses(key)]
    if unused:
        raise UserError(
            f"--data.columns {unused[0]}: rows of the form {form} do not use it. Remove it from the mapping."
        )
    made = FORMS[form].read(fields, where)
    if isinstance(made, str):
        return Row([], text=made)
    return None if made is None else conversation(made, fields, where)


def rename(fields: Any, columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The fields of a row under the keys that the forms know.

    Args:
        fields: The row as the file has it.
        columns: The file's key for keys of the forms, as {"instruction": "question", "output": "answer"}.
        where: Where the row stands.

    Raises:
        UserError: the row lacks such a key, or no form has a key that is to be filled.
    """
    check_object(fields, where, " and ".join(columns.values()))
    renamed = {key: value for key, value in fields.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if ours not in KEYS:
            hint = nearest(ours, KEYS)
            raise UserError(f"--data.columns {ours}: no form has this key; choose from {', '.join(KEYS)}.{hint}")
        if theirs not in fields:
            raise UserError(
                f"{where}, lacks {theirs}, which --data.columns names for {ours}; it has {key_names(fields)}."
                f"{nearest(theirs, map(str, fields))}"
            )
        renamed[ours] = fields[theirs]
    return renamed


def read_alpaca(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    output = text_of(fields, "output" if "output" in fields else "response", where)
    return turn(text_of(fields, "instruction", where), output)


def turn(prompt: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def read_history(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = []
    for i, pair in enumerate(list_of(fields, "history", where), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}, has history whose turn {i} is not a list of two texts, a prompt and its answer.")
        for content in pair:
            check_text(content, f"turn {i} of history", where)
        messages += turn(*pair)
    return messages + read_alpaca(fields, where)


def read_question_answer(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    return turn(text_of(fields, "question", where), text_of(fields, "answer", where))


def read_prompt_completion(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    return as_context(as_messages(fields["prompt"], "prompt", "user", where)) + answer(fields, "completion", where)


def read_messages(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    key = "messages" if fields.get("messages") is not None else "conversations"
    if not (values := list_of(fields, key, where)):
        raise UserError(f"{where}, has no messages in {key}. Its form is {EXAMPLES[key]}.")
    return as_messages(values, key, "user", where)


def read_preference(fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    chosen = answer(fields, "chosen", where)
    if fields.get("prompt") is not None:
        before = as_messages(fields["prompt"], "prompt", "user", where)
    elif any(fields.get(key) is not None for key in ("messages", "conversations")):
        before = read_messages(fields, where)
    elif chosen[0]["role"] == "assistant":
        raise UserError(f"{where}, lacks prompt, messages or conversations; it has {key_names(fields)}.")
    else:
        before = []
    if chosen[0]["role"] == "user":  # the whole conversation
        before = [m for m in before[:1] if m["role"] == "system"]
    elif chosen[0]["role"] == "system":
        before = []
    both = [value if isinstance(value, list) else [] for value in (fields["chosen"], fields["rejected"])]
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*both)))  # they share a prompt
    n = min(n, len(up_to_answer(chosen, where)) - 1)
    return as_context(before + chosen[:n]) + chosen[n:]


def read_label(fields: Mapping[str, Any], where: str) -> Optional[list[dict[str, Any]]]:
    key = "label" if fields.get("label") is not None else "kto_tag"
    label = fields.get(key)
    if isinstance(label, str) and label.lower() in ("true", "false"):  # from CSV
        label = label.lower() == "true"
    if label not in (0, 1):
        raise UserError(f"{where}, has {key} {shown(label)}. Expected true (a good answer) or false.")
    if not label:
        return None
    if any(fields.get(key) is not None for key in ("messages", "conversations")):
        messages = up_to_answer(read_messages(fields, where), where)
        return as_context(messages[:-1]) + messages[-1:]
    missing = FORMS["prompt_completion"].lacking(fields)
    if missing:
        raise UserError(f"{where}, lacks {' and '.join(missing)}; it has {key_names(fields)}.")
    return read_prompt_completion(fields, where)


def read_text(fields: Mapping[str, Any], where: str) -> str:
    check_text(fields["text"], "text", where, at_most=None)
    return fields["text"]


FORMS: dict[str, Form] = {  # the order decides
    "preference": Form(("chosen", "rejected"), read_preference, ("prompt", "messages", "conversations")),
    "label": Form(("messages|conversations|completion", "label|kto_tag"), read_label, ("prompt",)),
    "messages": Form(("messages",), read_messages),
    "sharegpt": Form(("conversations",), read_messages),
    "history": Form(("instruction", "output|response", "history"), read_history),
    "alpaca": Form(("instruction", "output|response"), read_alpaca),
    "prompt_completion": Form(("prompt", "completion"), read_prompt_completion),
    "question_answer": Form(("question", "answer"), read_question_answer),
    "text": Form(("text",), read_text),
}
KEYS = list(dict.fromkeys(k for form in FORMS.values() for key in form.keys for k in key.split("|")))
KEYS += SHARED


def conversation(messages: list[dict[str, Any]], fields: Mapping[str, Any], where: str) -> Row:
    """The messages as a row, up to the last of the assistant, with what the row has beside them. Reasoning belongs to
    the last answer, unless that holds it already."""
    messages = up_to_answer(messages, where)
    texts = {key: fields[key] for key in REASONING if isinstance(fields.get(key), str)}
    thoughts = {key: text for key, text in texts.items() if text.strip() not in messages[-1]["content"]}
    check_texts(thoughts, "reasoning", where)
    if not any(messages[-1].get(key) for key in REASONING):
        messages[-1] |= thoughts
    return Row(*with_shared(messages, fields, where))


def with_shared(
    messages: list[dict[str, Any]], fields: Mapping[str, Any], where: str
) -> tuple[list[dict[str, Any]], Optional[list[Any]]]:
    """The messages with the `system`, `input` and `context` of a row, and the row's tools.

    `input` and `context` belong to the last prompt; in a whole conversation to the first one, unless it holds their
    text already.
    """
    prompts = [m for m in messages if m["role"] == "user"]
    whole = any(fields.get(key) is not None for key in ("messages", "conversations"))
    said = "\n".join(m["content"] for m in prompts) if whole else ""
    beside = [key for key in ("input", "context") if fields.get(key) is not None]
    extra = [text for key in beside if (text := text_of(fields, key, where)).strip() and text.strip() not in said]
    if extra:
        if not prompts:
            raise UserError(f"{where}, has input or context, but no message of the user that it could belong to.")
        prompts[0 if whole else -1]["input"] = "\n\n".join(extra)
    if fields.get("system"):
        system = text_of(fields, "system", where)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"] != system:
            raise UserError(f"{where}, has system and another text in its system message. Leave one of them out.")
    tools = [parsed(tool) for tool in list_of(fields, "tools", where)]
    check_texts(tools, "tools", where)
    return messages, tools or None


def up_to_answer(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The messages up to the last of the assistant."""
    n = max((i for i, m in enumerate(messages, 1) if m["role"] == "assistant"), default=0)
    if not n:
        raise UserError(f"{where}, has no message of the assistant, so nothing could be trained.")
    return messages[:n]


def as_context(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a prompt: answers among them are not trained unless they say so themselves."""
    return [{**m, "_context": True} if m["role"] == "assistant" and not m.get("train") else m for m in messages]


def answer(fields: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The messages under `chosen` or `completion`, one of them the assistant's."""
    messages = as_messages(fields[key], key, "assistant", where)
    if all(m["role"] != "assistant" for m in messages):
        raise UserError(f"{where}, has {key} without a message of the assistant.")
    return messages


def as_messages(value: Any, key: str, role: str, where: str) -> list[dict[str, Any]]:
    """A text (of `role`), a message or a list of messages, as a list."""
    if isinstance(value, str):
        check_text(value, key, where)
        return [{"role": role, "content": value}]
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else kind(value)
        raise UserError(f"{where}, has {key} that is {found}; a text or messages are wanted.")
    place = "" if key in ("messages", "conversations") else f" of {key}"
    return [message(m, f"{where}, message {i}{place}") for i, m in enumerate(values, 1)]


def message(fields: Any, where: str) -> dict[str, Any]:
    """One message, in OpenAI's spelling (role, content) or ShareGPT's (from, value)."""
    check_object(fields, where, "role and content")
    role_key = "role" if fields.get("role") is not None else "from"
    content_key = "content" if fields.get("content") is not None else "value"
    spoken = fields.get(role_key)
    if spoken is None:
        raise UserError(f"{where}, lacks role; it has {key_names(fields)}.")
    role = ROLES.get(spoken.lower()) if isinstance(spoken, str) else None
    if role is None:
        hint = nearest(str(spoken), ROLES)
        known = "user, assistant, system or tool"
        raise UserError(f"{where}, has {role_key} {shown(spoken)}, which is unknown; {known} is wanted.{hint}")
    content = fields.get(content_key)
    calls: Any = fields.get("tool_calls") or []
    if fields.get("function_call"):  # OpenAI's older spelling
        calls = [fields["function_call"]]
    if spoken.lower() in ("function_call", "tool_call"):
        calls, content = parsed(content), ""
        calls = calls if isinstance(calls, list) else [calls]
    elif isinstance(content, list):
        content = "".join(text_part(part, where) for part in content)
    elif content is None and calls:
        content = ""
    if content is None and not {"content", "value"} & fields.keys():
        raise UserError(f"{where}, lacks content; it has {key_names(fields)}.")
    check_text(content, "content" if "content" in fields else content_key, where)
    made: dict[str, Any] = {"role": role, "content": content}
    if calls:
        if not isinstance(calls, list):
            raise UserError(f"{where}, has tool_calls that is {kind(calls)} and not a list.")
        made["tool_calls"] = [tool_call(call, where) for call in calls]
        check_texts(made["tool_calls"], "tool_calls", where)
    beside = {str(key): value for key, value in fields.items() if key not in READ and value is not None}
    for key, value in beside.items():
        check_texts(value, key, where)
        if key in TEXTS:
            check_text(value, key, where)
    made |= beside
    for key in ("weight", "train"):
        if (value := fields.get(key)) is not None:
            if value not in (0, 1):
                wanted = "0 or 1" if key == "weight" else "true or false"
                raise UserError(f"{where}, has {key} {shown(value)}; {wanted} is wanted.")
            made["train"] = bool(value)
    return made


def text_part(part: Any, where: str) -> str:
    """The text of a part of a content."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        found = f"of type {part.get('type')!r}" if isinstance(part, dict) else kind(part)
        raise UserError(
            f"{where}, has a part of its content that is {found}; only "
            '{"type": "text", "text": "..."} is known. Leave such rows out (--data.on_bad_row skip).'
        )
    return part["text"]


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call in OpenAI's form, with the arguments as an object where they are one."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}, has a tool call {shown(call)}; its form is "
            '{"function": {"name": "...", "arguments": {...}}} or {"name": "...", "arguments": {...}}.'
        )
    arguments = function.get("arguments")
    arguments = {} if arguments is None else parsed(arguments)
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if call.get("id") is not None else made


def parsed(value: Any) -> Any:
    """The list or object that a text of JSON holds; anything else as it is."""
    if isinstance(value, str):
        try:
            inner = parse_json(value)
        except ValueError:
            return value
        return inner if isinstance(inner, (dict, list)) else value
    return value


def list_of(fields: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A list, or the JSON of one as CSV files have it; empty where the key is missing or null."""
    value = fields.get(key)
    if value is None or value == "":
        return []
    value = parsed(value)
    if not isinstance(value, list):
        raise UserError(f"{where}, has {key} {shown(value)}, which is {kind(value)} and not a list.")
    return value


def text_of(fields: Mapping[str, Any], key: str, where: str) -> str:
    check_text(fields[key], key, where)
    return fields[key]


def check_text(value: Any, key: str, where: str, at_most: Optional[int] = MAX_CHARACTERS) -> None:
    """Raises:
    UserError: the value is not text, or a text that no tokenizer takes or that is beyond all measure.
    """
    remedy = "Mend the row; --data.on_bad_row skip leaves such rows out."
    if not isinstance(value, str):
        raise UserError(f"{where}, has {key} {shown(value)}, which is {kind(value)} and not text.")
    if at_most and len(value) > at_most:
        remedy = "--data.on_bad_row skip leaves such rows out."
        raise UserError(f"{where}, has {key} of {len(value):,} characters, more than {at_most:,}. {remedy}")
    if "\0" in value:
        raise UserError(f"{where}, has {key} with a NUL character (character {value.index(chr(0)) + 1}). {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where}, has {key} with half a surrogate pair (character {e.start + 1}), which is no text. {remedy}"
        ) from e


def check_texts(value: Any, key: str, where: str) -> None:
    """Check every text in nested lists and objects."""
    for text in texts_in(value):
        check_text(text, key, where)


def texts_in(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def check_object(value: Any, where: str, wanted: str) -> None:
    if not isinstance(value, dict):
        example = EXAMPLES.get(wanted.split()[0])
        form = f" (as {example})" if example else ""
        raise UserError(f"{where}, is {kind(value)}, not an object with {wanted}{form}.")


def key_names(fields: Mapping[str, Any]) -> str:
    """The keys, in one line of bearable length."""
    names = [" ".join(str(key)[:40].split()) for key in list(fields)[:20]]
    return ", ".join(names + ["..."] * (len(fields) > 20)) or "no keys"


def shown(value: Any) -> str:
    return repr(str(value)[:40])
