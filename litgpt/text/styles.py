"""LitGPT's named prompt styles: a fixed text around a prompt. The texts are in `styles.yaml`."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Optional, Union

from litgpt.errors import UserError
from litgpt.storage.files import read_yaml
from litgpt.text.prompt_style import Message, PromptStyle, Rendered


class NamedStyle(PromptStyle):
    """A fixed text around the prompt. The answer follows it and ends with the tokenizer's EOS. Each style is a class.

    Names in braces are replaced in one pass, so braces in a row are kept. A style without `with_input` puts the input
    below the prompt, after an empty line; LitGPT drops it there.

    Attributes:
        name: As in `--data.prompt_style`.
        text: Contains `{prompt}`, and `{system}` if the style supports a system message.
        system: Default system message. If it is empty, `{system}` is replaced by nothing.
        system_frame: Replaces `{system}` in `text`: the system message with the text around it.
        with_input: Text for a prompt that has an input. Contains `{input}` as well.
        input_system: Default system message for `with_input`.
        close: Text between an answer and the next prompt, which is rendered with the part of `text` after `{system}`.
            None if the style supports a single turn only.
        models: A regular expression for LitGPT's names of the models that were trained in this style.
        stops: Tokens besides EOS at which LitGPT stops, each as a sequence of tokens or their ids.
    """

    name: str
    text: str
    system: str = ""
    system_frame: str = "{system}"
    with_input: str = ""
    input_system: str = ""
    close: Optional[str] = None
    stops: Sequence[Sequence[Union[str, int]]] = ()
    own_special_tokens = False  # the tokenizer adds BOS, and the answer ends with EOS

    @property
    def single_turn(self) -> bool:
        return self.close is None

    def stop_tokens(self, tokenizer: Any) -> tuple[list[int], ...]:
        others = ([t if isinstance(t, int) else tokenizer.token_to_id(t) for t in stop] for stop in self.stops)
        return ([tokenizer.eos_id], *others)

    def stop_ids(self, tokenizer: Any) -> frozenset[int]:
        """Those of a subclass that implements `stop_tokens`. The model folder names the stop tokens of other styles."""
        return frozenset() if type(self).stop_tokens is NamedStyle.stop_tokens else super().stop_ids(tokenizer)

    def prompt(self, messages: Sequence[Message], tools: Optional[list] = None) -> str:
        """The text that the answer to the last message follows.

        Args:
            messages: An optional system message, then user and assistant in turn, ending with the user.
            tools: Must be empty: no named style supports tools.

        Raises:
            UserError: The style cannot represent these messages.
        """
        has_system = bool(messages) and messages[0]["role"] == "system"
        system, turns = messages[0]["content"] if has_system else "", messages[has_system:]
        self.check_messages(system, turns, bool(tools))
        first = turns[0]
        with_input = bool(self.with_input and first.get("input"))
        system = system or (self.input_system if with_input else self.system)
        framed = fill(self.system_frame, system=system) if system else ""
        if with_input:
            text = fill(self.with_input, system=framed, prompt=first["content"], input=first["input"])
        else:
            text = fill(self.text, system=framed, prompt=with_input_below(first))
        for answer, user in zip(turns[1::2], turns[2::2]):
            turn = fill(self.text.rpartition("{system}")[2], prompt=with_input_below(user))
            text += f"{answer['content']}{self.close}{turn}"
        return text

    def check_messages(self, system: str, turns: Sequence[Message], tools: bool) -> None:
        style, roles = f"the prompt style {self.name!r}", [m["role"] for m in turns]
        if len(turns) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
            found = ", ".join(roles) or "none"
            raise UserError(f"{style} expects user and assistant messages in turn, ending with the user; got {found}")
        if tools or any(m.get("tool_calls") for m in turns):
            raise UserError(f"{style} does not support tools or tool calls (chat and chatml may)")
        if system and "{system}" not in self.text:
            others = ", ".join(name for name, other in STYLES.items() if "{system}" in other.text)
            raise UserError(f"{style} does not support a system message (these do: chat, chatml, {others})")
        if len(turns) > 1 and self.close is None:
            others = ", ".join(name for name, other in STYLES.items() if other.close is not None)
            raise UserError(f"{style} supports a single turn only (for several, use chat, chatml, {others})")

    def render_row(
        self, messages: Sequence[Message], tools: Optional[list] = None, turn_end: Optional[str] = None
    ) -> Rendered:
        """Render a conversation that ends with an answer, and locate the assistant's answers in the text.

        An answer inside the conversation ends after the stop token that the style writes; the last one has none yet.
        """
        prompt, answers = self.prompt(messages[:-1], tools or messages[-1].get("tool_calls")), []
        for i, message in enumerate(messages[:-1]):
            if message["role"] == "assistant":
                start = len(self.prompt(messages[:i]))
                answers.append((start, start + len(message["content"] + (self.close or "").rstrip()), i))
        text = prompt + messages[-1]["content"]
        return Rendered(text, [*answers, (len(prompt), len(text), len(messages) - 1)])

    def jinja(self, bos: str, eos: str) -> str:
        """The style as a chat template for other programs. A single-turn style renders the last prompt, as `litgpt
        chat` does.

        Args:
            bos: What precedes the text: BOS, or whatever the tokenizer adds by itself.
            eos: The token that ends an answer.
        """
        prompt = "(message.content + ('\\n\\n' + message.input if message.input else ''))"
        first = self.first_turn(self.text, self.system, prompt=prompt)
        if self.with_input:
            with_input = self.first_turn(
                self.with_input, self.input_system, prompt="message.content", input="message.input"
            )
            first = f"({with_input} if message.input else {first})"
        placeholders = {
            "NO_SYSTEM": "false" if "{system}" in self.text else "system",
            "ONE_PROMPT": "true" if self.close is None else "false",
            "BOS": quoted(bos),
            "FIRST": first,
            "LATER": expression(self.text.rpartition("{system}")[2], prompt=prompt),
            "EOS": quoted(eos),
            "CLOSE": quoted(self.close or ""),
        }
        return re.sub("|".join(placeholders), lambda found: placeholders[found[0]], JINJA)

    def first_turn(self, text: str, default_system: str, **values: str) -> str:
        """A template expression for the first turn, with the conversation's system message or else the default one."""
        framed = expression(self.system_frame, system=f"(system or {quoted(default_system)})")
        return expression(text, system=f"({framed})" if default_system else f"(({framed} if system else ''))", **values)


JINJA = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages and messages[0].role == 'system' else messages %}
{%- if tools or NO_SYSTEM %}
    {{- raise_exception('This prompt style does not show such messages.') }}
{%- endif %}
{%- set ns = namespace(start=0) %}
{%- for message in turns %}
    {%- if message.role == 'user' and ONE_PROMPT %}
        {%- set ns.start = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- BOS }}
{%- for message in turns[ns.start:] %}
    {%- if message.role == 'user' and loop.first %}
        {{- FIRST }}
    {%- elif message.role == 'user' %}
        {{- LATER }}
    {%- elif message.role == 'assistant' and not message.tool_calls %}
        {{- message.content + (EOS if loop.last else CLOSE) }}
    {%- else %}
        {{- raise_exception('This prompt style does not show such messages.') }}
    {%- endif %}
{%- endfor %}
"""


def fill(text: str, **values: str) -> str:
    """Replace each `{name}` in `text` by its value. Braces inside values are left alone."""
    return "".join(values.get(part, f"{{{part}}}") if i % 2 else part for i, part in enumerate(split_names(text)))


def expression(text: str, **values: str) -> str:
    """The template expression that does what `fill` does; `values` are expressions too."""
    parts = [
        values.get(part, quoted(f"{{{part}}}")) if i % 2 else quoted(part) for i, part in enumerate(split_names(text))
    ]
    return " + ".join(part for part in parts if part != quoted("")) or quoted("")


@cache
def split_names(text: str) -> list[str]:
    """Split a text at its names in braces: text, name, text, name, ..., text."""
    return re.split(r"\{(\w+)\}", text)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def with_input_below(message: Message) -> str:
    return f"{message['content']}\n\n{message['input']}" if message.get("input") else message["content"]


class ChatML(NamedStyle):
    """ChatML with a fixed end of turn. The styles of Qwen and other models are subclasses.

    Args:
        system_message: Default system message; None for none, or for that of the subclass.
    """

    name = "chatml"
    text = "{system}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    system_frame = "<|im_start|>system\n{system}<|im_end|>\n"
    close = "<|im_end|>\n"

    def __init__(self, system_message: Optional[str] = None) -> None:
        self.system = system_message or self.system

    @property
    def system_message(self) -> Optional[str]:
        return self.system or None


def style_class(name: str, fields: dict[str, Any]) -> type[NamedStyle]:
    """The class of a style in `styles.yaml`."""
    base = ChatML if fields.get("text") == ChatML.text else NamedStyle
    return type(fields.pop("class"), (base,), {"name": name, "__module__": PUBLIC, **fields})


PUBLIC = "litgpt.prompts"  # LitGPT's module of these classes, which records of a style name
ChatML.__module__ = PUBLIC
STYLES: dict[str, NamedStyle] = {
    name: style_class(name, fields)() for name, fields in read_yaml(Path(__file__).with_name("styles.yaml")).items()
}
STYLES["default"] = STYLES["none"]
CLASSES = {"ChatML": ChatML, **{type(style).__name__: type(style) for style in STYLES.values()}}
PromptStyle.named = {**STYLES}
