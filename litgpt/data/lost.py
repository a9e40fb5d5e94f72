"""Parts of a conversation that a prompt style does not show."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.text.chat_template import REASONING, Message, PromptStyle

EARLIER = "reasoning of earlier turns"  # many templates drop it on purpose
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
