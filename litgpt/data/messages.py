"""Messages of a conversation, and texts, from the fields of a row: checked, and in OpenAI's format."""

import re
from collections.abc import Mapping
from typing import Any, Optional

from litgpt.errors import UserError, kind, nearest
from litgpt.storage.files import parse_json

MAX_CHARACTERS = 1_000_000
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "gemini", "claude", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # the content is the call
    **dict.fromkeys(("tool", "ipython", "function", "observation", "function_response", "tool_response"), "tool"),
}
EXAMPLES = {
    "instruction": '{"instruction": "...", "input": "...", "output": "..."}',
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "conversations": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
}
TEXTS = ("name", "tool_call_id")  # fields of a message that must be strings
READ = ("role", "from", "content", "value", "tool_calls", "function_call", "weight", "train")  # read by `message`
TRANSCRIPT = re.compile(r"\s*Human: .*?\n\nAssistant:", re.DOTALL)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SKIP = "skip such rows with --data.on_bad_row skip."
Fields = Mapping[str, Any]
Messages = list[dict[str, Any]]


def turn(prompt: str, answer: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def has_messages(fields: Fields) -> bool:
    return any(fields.get(key) is not None for key in ("messages", "conversations"))


def up_to_answer(messages: Messages, where: str) -> Messages:
    """The messages up to the last answer."""
    for n in range(len(messages), 0, -1):
        if messages[n - 1]["role"] == "assistant":
            return messages[:n]
    raise UserError(f"{where}, has no assistant message, so there is nothing to train on.")


def as_context(messages: Messages) -> Messages:
    """The messages of a prompt. Answers among them are not trained on unless their `train` is true."""
    return [{**m, "_context": True} if m["role"] == "assistant" and not m.get("train") else m for m in messages]


def answer(fields: Fields, key: str, where: str) -> Messages:
    """The messages of `chosen` or `completion`, which must include an answer."""
    messages = as_messages(transcript(fields[key]), key, "assistant", where)
    if all(m["role"] != "assistant" for m in messages):
        raise UserError(f"{where}, has {key} without an assistant message.")
    return messages


def transcript(value: Any) -> Any:
    """The messages of a conversation in Anthropic's form, such as "Human: Hi\\n\\nAssistant: Hello". Other values are
    returned as they are."""
    if not isinstance(value, str) or not TRANSCRIPT.match(value):
        return value
    _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant): ?", value)
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return [{"role": role, "content": text} for role, text in zip(roles, parts[1::2])]


def as_messages(value: Any, key: str, role: str, where: str) -> Messages:
    """A string (by `role`), a message, or a list of messages, as a list."""
    if isinstance(value, str) and not isinstance(value := messages_in(value), list):
        check_text(value, key, where)
        return [{"role": role, "content": value}]
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else kind(value)
        raise UserError(f"{where}, has {key} that is {found}. Expected a string or messages.")
    place = "" if key in ("messages", "conversations") else f" of {key}"
    return [message(m, f"{where}, message {i}{place}") for i, m in enumerate(values, 1)]


def messages_in(text: str) -> Any:
    """The messages in a text that is the JSON of a list of them, as in CSV files. Other texts stay."""
    values = parsed(text) if text.lstrip().startswith("[") else text
    is_list = isinstance(values, list) and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in values)
    return values if is_list and values else text


def message(fields: Any, where: str) -> dict[str, Any]:
    """A message in OpenAI's format (role, content) or ShareGPT's (from, value)."""
    check_object(fields, where, "role and content")
    check_media(fields, where)
    role_key = "role" if fields.get("role") is not None else "from"
    content_key = "content" if fields.get("content") is not None else "value"
    speaker = fields.get(role_key)
    if speaker is None:
        raise missing(fields, "role", where)
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        hint = nearest(str(speaker), ROLES)
        raise UserError(f"{where}, has {role_key} {shown(speaker)}. Expected user, assistant, system, or tool.{hint}")
    content = fields.get(content_key)
    calls: Any = fields.get("tool_calls") or []
    if fields.get("function_call"):  # OpenAI's older format
        calls = [fields["function_call"]]
    if speaker.lower() in ("function_call", "tool_call"):
        calls, content = parsed(content), ""
        calls = calls if isinstance(calls, list) else [calls]
    elif isinstance(content, list):
        content = "".join(text_part(part, where) for part in content)
    elif content is None and calls:
        content = ""
    if content is None and not {"content", "value"} & fields.keys():
        raise missing(fields, "content", where)
    check_text(content, "content" if "content" in fields else content_key, where)
    made: dict[str, Any] = {"role": role, "content": content}
    if calls:
        if not isinstance(calls, list):
            raise UserError(f"{where}, has tool_calls that is {kind(calls)}, not a list.")
        made["tool_calls"] = [tool_call(call, where) for call in calls]
        check_texts(made["tool_calls"], "tool_calls", where)
    for key, value in fields.items():
        if key not in READ and value is not None:
            check_texts(value, key, where)
            if key in TEXTS:
                check_text(value, key, where)
            made[str(key)] = value
    for key, expected in (("weight", "0 or 1"), ("train", "true or false")):
        if (value := fields.get(key)) is not None:
            if value not in (0, 1):
                raise UserError(f"{where}, has {key} {shown(value)}. Expected {expected}.")
            made["train"] = bool(value)
    return made


def text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        found = f"of type {part.get('type')!r}" if isinstance(part, dict) else kind(part)
        raise UserError(
            f'{where}, has a part of its content that is {found}. Only {{"type": "text", "text": "..."}} is supported. '
            f"Remove it, or {SKIP}"
        )
    return part["text"]


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call in OpenAI's format. Arguments that are the JSON of an object are parsed."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}, has a tool call {shown(call)}. Expected "
            '{"function": {"name": "...", "arguments": {...}}} or {"name": "...", "arguments": {...}}.'
        )
    arguments = function.get("arguments")
    arguments = {} if arguments is None else parsed(arguments)
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if call.get("id") is not None else made


def parsed(value: Any) -> Any:
    """The list or object in a JSON string. Other values are returned as they are."""
    if isinstance(value, str):
        try:
            inner = parse_json(value)
        except ValueError:
            return value
        return inner if isinstance(inner, (dict, list)) else value
    return value


def list_of(fields: Fields, key: str, where: str) -> list[Any]:
    """A list, or the JSON of one, as in CSV files. Empty if the key is missing or null."""
    value = fields.get(key)
    if value is None or value == "":
        return []
    value = parsed(value)
    if not isinstance(value, list):
        raise UserError(f"{where}, has {key} {shown(value)}, which is {kind(value)}, not a list.")
    return value


def text_of(fields: Fields, key: str, where: str) -> str:
    check_text(fields[key], key, where)
    return fields[key]


def check_text(value: Any, key: str, where: str, at_most: Optional[int] = MAX_CHARACTERS) -> None:
    """Raise `UserError` if the value is not a string, is too long, or has characters that no tokenizer accepts."""
    if not isinstance(value, str):
        raise UserError(f"{where}, has {key} {shown(value)}, which is {kind(value)}, not a string.")
    if at_most and len(value) > at_most:
        raise UserError(
            f"{where}, has {key} of {len(value):,} characters. The limit is {at_most:,}. Shorten it, or {SKIP}"
        )
    if "\0" in value:
        raise UserError(f"{where}, has {key} with a NUL character (character {value.index(chr(0)) + 1}).")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}, has {key} with an unpaired surrogate (character {e.start + 1}).") from e


def check_texts(value: Any, key: str, where: str) -> None:
    """Check every string in nested lists and objects."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            check_text(value, key, where)
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def check_object(value: Any, where: str, expected: str) -> None:
    if not isinstance(value, dict):
        example = EXAMPLES.get(expected.split()[0])
        form = f" (as {example})" if example else ""
        raise UserError(f"{where}, is {kind(value)}, not an object with {expected}{form}.")


def check_media(fields: Fields, where: str) -> None:
    """Raise `UserError` if a row or a message has more than text: without its image, an answer would be wrong."""
    if key := next((key for key in MEDIA if fields.get(key)), ""):
        raise UserError(f"{where}, has {key}, and only text is supported. Remove {key} from the file, or {SKIP}")


def missing(fields: Fields, keys: str, where: str) -> UserError:
    return UserError(f"{where}, is missing {keys}. Found: {key_names(fields)}.")


def key_names(fields: Fields) -> str:
    """The keys, in one line of limited length."""
    names = [" ".join(str(key)[:40].split()) for key in list(fields)[:20]]
    return ", ".join(names + ["..."] * (len(fields) > 20)) or "no keys"


def shown(value: Any) -> str:
    return repr(str(value)[:40])
