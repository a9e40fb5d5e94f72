"""Parts of a conversation that a prompt style does not show, and how they become text that it shows."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.text.chat_template import REASONING
from litgpt.text.prompt_style import Message, PromptStyle

EARLIER = "reasoning of earlier turns"  # many templates drop it on purpose
FIELD, LABEL = "message field ", "messages."  # begin the names of fields that litgpt does not know
KNOWN = ("role", "content", "input", "train", "_context", "tool_calls", *REASONING)
# fields that identify or describe a message and are rarely meant for the model
LABELS = """name tool_call_id id ids uuid idx index turn turn_id message_id parent_id timestamp time date created_at
    updated_at create_time update_time source src lang language model model_name token_count tokens n_tokens length
    score scores rating rank category tags labels metadata meta url author user_id end_turn recipient channel weight
    hash""".split()
SPECIAL = ("system messages", "tool definitions", "tool calls", "tool results")  # what a template may refuse
KINDS = {"system": "system messages", "user": "prompts", "assistant": "answers", "tool": "tool results"}


class Lookup:
    """Renders conversations with markers in place of their texts, and finds the markers that do not appear.

    What a template shows depends on the shape of a conversation (roles, calls, tools), rarely on its words, so each
    shape is rendered once.
    """

    def __init__(self, style: PromptStyle) -> None:
        self.style = style
        self.known: dict[tuple, frozenset[str]] = {}

    def lost(self, messages: Sequence[Message], tools: Optional[list] = None) -> frozenset[str]:
        """Names of the kinds of parts that do not appear in the text of a conversation."""
        return frozenset(kind for kind in self.hidden(messages, tools) if not kind.startswith(LABEL))

    def hidden(self, messages: Sequence[Message], tools: Optional[list] = None) -> frozenset[str]:
        """The same with the fields that only label a message, as `LABEL` and the name of the field."""
        calls = [m["tool_calls"] for m in messages if m.get("tool_calls")]
        shape = (*((m["role"], *(key for key, value in m.items() if value)) for m in messages), bool(tools))
        if calls or tools:
            shape += (json.dumps([calls, tools], default=str),)
        if shape not in self.known:
            self.known[shape] = self.find(messages, tools)
        return self.known[shape]

    def find(self, messages: Sequence[Message], tools: Optional[list]) -> frozenset[str]:
        markers: dict[str, str] = {}

        def mark(kind: str) -> str:
            marker = f"qz{len(markers):03d}zq"
            markers[marker] = kind
            return marker

        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
        marked = [self.marked(m, mark, earlier=i < last) for i, m in enumerate(messages)]
        offered = [marked_tool(tool, mark) for tool in tools or ()]
        try:
            text = self.style.render_row(marked, offered or None).text
        except UserError:  # the template depends on the words, so what it shows is unknown
            return frozenset()
        return frozenset(kind for marker, kind in markers.items() if marker not in text)

    def marked(self, message: Message, mark: Callable[[str], str], earlier: bool) -> dict[str, Any]:
        made = dict(message)
        if message.get("content"):
            made["content"] = mark(KINDS.get(message["role"], "messages"))
        if message.get("input"):
            made["input"] = mark("inputs")
        reasoning = [key for key in REASONING if isinstance(message.get(key), str) and message[key]]
        if reasoning:
            made |= dict.fromkeys(reasoning, mark(EARLIER if earlier else "reasoning"))
        if message.get("tool_calls"):
            made["tool_calls"] = [marked_call(call, mark) for call in message["tool_calls"]]
        for key in message.keys() - set(KNOWN):
            kind = f"{LABEL}{key}" if key.lower() in LABELS else f"{FIELD}{key!r}"
            made[key] = with_marks(message[key], lambda kind=kind: mark(kind))  # type: ignore[misc]
        return made


def marked_call(call: Any, mark: Callable[[str], str]) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = with_marks(function.get("arguments"), lambda: mark("tool calls"))
    return {**call, "function": {**function, "name": mark("tool calls"), "arguments": arguments}}


def marked_tool(tool: Any, mark: Callable[[str], str]) -> Any:
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        return {**tool, "function": marked_tool(tool["function"], mark)}
    return {**tool, "name": mark("tool definitions")} if isinstance(tool, Mapping) and tool.get("name") else tool


def with_marks(value: Any, mark: Callable[[], str]) -> Any:
    """Arguments with a marker in place of each text. Their names stay."""
    if isinstance(value, Mapping):
        return {key: with_marks(inner, mark) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_marks(inner, mark) for inner in value]
    return mark() if isinstance(value, str) and value else value


def as_text(
    messages: Sequence[Message], tools: Optional[list], lost: Collection[str]
) -> tuple[list[dict[str, Any]], Optional[list]]:
    """A conversation whose lost parts are texts of its messages, and the tools that are not.

    Tools, their calls, and their results are written as in Hermes' format, reasoning between think tags, a system
    message above the first prompt, an unknown field above the content of its message.

    Args:
        lost: Kinds of parts, as `Lookup` names them.
    """
    made = [dict(m) for m in messages]
    for m in made:
        for key in [key for key in m if f"{FIELD}{key!r}" in lost and m[key]]:
            value = m.pop(key)
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            m["content"] = joined(f"{key}: {text}", m["content"])
        if "inputs" in lost and m.get("input"):
            m["content"] = joined(m["content"], m.pop("input"))
        if "tool calls" in lost and m.get("tool_calls"):
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in m.pop("tool_calls")]
            m["content"] = joined(m["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls), by="\n")
        reasoning = next((m[key] for key in REASONING if isinstance(m.get(key), str) and m[key]), None)
        if "reasoning" in lost and reasoning:
            m["content"] = joined(f"<think>\n{reasoning.strip()}\n</think>", m["content"])
            for key in REASONING:
                m.pop(key, None)
        if "tool results" in lost and m["role"] == "tool":
            m["role"], m["content"] = "user", f"<tool_response>\n{m['content']}\n</tool_response>"
    if "tool results" in lost:
        made = merged(made)
    if "tool definitions" in lost and tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = f"You can call these functions:\n<tools>\n{lines}\n</tools>\n{CALL}"
        if made[0]["role"] != "system":
            made.insert(0, {"role": "system", "content": text})
        else:
            made[0]["content"] = joined(made[0]["content"], text)
        tools = None
    first = next((m for m in made if m["role"] == "user"), None)
    if "system messages" in lost and made[0]["role"] == "system" and first:
        first["content"] = joined(made.pop(0)["content"], first["content"])
    return made, tools


CALL = """To call a function, write its name and arguments as JSON:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>"""


def joined(*texts: str, by: str = "\n\n") -> str:
    return by.join(text for text in texts if text)


def merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with several user messages in a row as one."""
    made: list[dict[str, Any]] = []
    for m in messages:
        if made and m["role"] == made[-1]["role"] == "user":
            made[-1]["content"] = joined(made[-1]["content"], m["content"], by="\n")
        else:
            made.append(m)
    return made
