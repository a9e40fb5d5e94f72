"""The prompt style that renders a chat template as `transformers` does."""

import json
import math
import re
import time
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple, Optional

from jinja2 import meta

from litgpt.errors import UserError, nearest
from litgpt.storage.files import parse_json
from litgpt.text import sandbox
from litgpt.text.prompt_style import Message, PromptStyle, Rendered, now

REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates look for the same text
BESIDE_CONTENT = frozenset(("tool_calls", *REASONING))  # message fields that are answers, too
INTERNAL = ("input", "train", "_context")  # message fields that no template reads
ANSWER = "(answer)"
RESERVED = ("messages", "tools", "add_generation_prompt")  # variables that no row and no request may set
PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER})
MANGLED = ("'key': 'value'", '\\"key\\"', "&#34;")  # an object printed by Python, JSON in JSON, JSON in HTML


@dataclass(frozen=True)
class ChatTemplate(PromptStyle):
    """A Jinja template.

    Args:
        template: The source.
        variables: What it may use besides the messages, such as `bos_token`, `eos_token`, and `enable_thinking`.
        name: Shown on the screen and recorded in `prompt_style.yaml`.
        for_tools: The checkpoint's separate template for conversations with tools, if there is one.
    """

    template: str
    variables: Mapping[str, Any]
    name: str = "chat"
    for_tools: Optional["ChatTemplate"] = None
    own_special_tokens = True

    @cached_property
    def compiled(self) -> Any:
        environment = sandbox.Sandbox()
        environment.globals["strftime_now"] = lambda format: now().strftime(format)
        try:
            template = environment.from_string(self.template)
        except Exception as e:  # also from Python's compiler
            raise UserError(f"The chat template is not valid: {reason_of(e)}.") from e
        template.globals = dict(template.globals)  # jinja2 copies them for each rendering; a ChainMap makes that slow
        return template

    def with_variables(self, variables: Mapping[str, Any], strict: bool = False) -> "ChatTemplate":
        for name, value in variables.items():
            if name in RESERVED or not str(name).isidentifier():
                why = "litgpt sets it" if name in RESERVED else "it is not the name of a variable"
                raise UserError(f"The chat template's variable {name!r} cannot be set: {why}.")
            if strict and name not in self.variable_names:
                hint = nearest(name, self.variable_names)
                raise UserError(f"The chat template does not use the variable {name!r}.{hint}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"The chat template's variable {name!r} cannot be {value}.")
        for_tools = self.for_tools and self.for_tools.with_variables(variables)
        made = replace(self, variables={**self.variables, **variables}, for_tools=for_tools)
        made.__dict__["compiled"] = self.compiled
        return made

    @cached_property
    def variable_names(self) -> set[str]:
        """What the template, or the one for tools, reads."""
        names = meta.find_undeclared_variables(self.compiled.environment.parse(self.template))
        return names | self.for_tools.variable_names if self.for_tools else names

    def with_defaults(self, variables: Mapping[str, Any]) -> "ChatTemplate":
        self.with_variables(variables, strict=True)
        lines = (
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
            for name, value in variables.items()
        )
        defaults = "".join(lines) + "{{ '' }}"  # a line break at the start of the template must stay
        for_tools = self.for_tools and replace(self.for_tools, template=defaults + self.for_tools.template)
        return replace(self, template=defaults + self.template, for_tools=for_tools)

    @cached_property
    def time_formats(self) -> list[str]:
        """The formats in the template; the complete time if they are not literals."""
        uses = re.findall(r"\bstrftime_now\b(?!\s+is\b)", self.template)
        literals = re.findall(r"\bstrftime_now\s*\(\s*(['\"])(.*?)\1\s*\)", self.template)
        return [text for _, text in literals] if len(literals) == len(uses) else ["%Y-%m-%dT%H:%M:%S"]

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Optional[list] = None,
        marks: Optional[sandbox.Marks] = None,
    ) -> str:
        """The text of a conversation.

        Args:
            marks: Collects the parts that the template marks as answers.

        Raises:
            UserError: The template refuses it. The message quotes the template's own words.
        """
        if tools and self.for_tools:
            return self.for_tools.render(messages, add_generation_prompt, tools, marks)
        form = self.call_form if any(message.get("tool_calls") for message in messages) else None
        return self.run([template_message(m, form) for m in messages], add_generation_prompt, tools, marks)

    def run(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Optional[list] = None,
        marks: Optional[sandbox.Marks] = None,
    ) -> str:
        """Render messages that already have the form that this template reads."""
        template, environment = self.compiled, self.compiled.environment
        environment.until = time.monotonic() + sandbox.SECONDS
        try:
            given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
            fields = {"documents": None, **self.variables, **given}
            if marks is None:
                return template.render(fields)
            with marks.collect(template.generate(fields)) as pieces:
                return environment.concat(pieces)
        except Exception as e:  # an expression may raise anything
            raise UserError(f"the chat template refuses these messages: {reason_of(e)}") from e

    @cached_property
    def call_form(self) -> "CallForm":
        """The form in which this template shows tool calls, found by trying all of them. If several work, the first
        one wins: arguments as an object, which `transformers` recommends, and no content."""
        call = {"type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", **call}]}
        tool = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}

        def score(form: CallForm) -> int:
            best = -1  # the template refuses it
            for tools in (None, [tool]):
                with suppress(UserError):
                    text = self.run([dict(PROBE[0]), template_message(answer, form)], False, tools)
                    complete = "probe" in text and "key" in text and "value" in text
                    clean = not any(wrong in text for wrong in MANGLED)
                    best = max(best, complete + (complete and clean))
            return best

        empty: list[dict[str, Any]] = [{}, {"content": ""}]
        forms = [CallForm(as_text, content) for as_text in (False, True) for content in empty]
        forms += [CallForm(as_text, {"content": None}) for as_text in (False, True)]
        return max(forms, key=score)

    def prompt(self, messages: Sequence[Message], tools: Optional[list] = None) -> str:
        """The text that the answer to the last message follows."""
        return self.render(messages, True, tools)

    def render_row(
        self, messages: Sequence[Message], tools: Optional[list] = None, turn_end: Optional[str] = None
    ) -> Rendered:
        """Render a conversation, and locate the assistant's answers.

        An answer begins after the prompt before it and ends with the `turn_end` that closes it. What the template
        writes after that, such as a line break, is not part of the answer. If the template marks parts of its text with
        `{% generation %}`, those parts are the answers, each up to the `turn_end`.
        """
        if tools and self.for_tools:
            return self.for_tools.render_row(messages, tools, turn_end)
        marks = sandbox.Marks() if "endgeneration" in self.template else None
        text = self.render(messages, False, tools, marks)
        answers = []
        end = 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self.answer_start(text, end, messages, i, tools=tools)
                end = self.answer_end(text, start, messages, i, tools=tools, turn_end=turn_end)
                answers.append((start, end, i))
                if later := self.words_behind(text, end, messages, i, tools=tools, turn_end=turn_end):
                    answers.append((*later, i))
                    end = later[1]
        return Rendered(text, marked_parts(text, answers, marks.spans, turn_end) if marks else answers)

    def answer_start(self, text: str, earliest: int, messages: Sequence[Message], i: int, tools: Optional[list]) -> int:
        """Where answer `i` begins: after the prompt. If the text does not begin with the prompt (the template writes
        something else once an answer follows, or there is no prompt), that is where a different answer would change
        the text, or before that, where the words end that open an answer.

        Args:
            earliest: Where the answer before it ends.
        """
        content, (before, between, after) = stripped_content(messages[i]), self.frame
        end = between + content + after
        is_last = i == len(messages) - 1
        if is_last and before and content and content_only(messages[i]) and text.endswith(before + end):
            return len(text) - len(end)  # without rendering the prompt again
        with suppress(UserError):
            prompt = self.prompt(messages[:i], tools)
            if text.startswith(prompt):
                return len(prompt)
        other: dict[str, Any] = {"role": "assistant", "content": "\uffff"}
        try:
            start = shared_length(self.render([*messages[:i], other, *messages[i + 1 :]], False, tools), text)
        except UserError:  # the results that follow need calls
            other["tool_calls"] = [renamed(call) for call in messages[i].get("tool_calls") or ()]
            start = shared_length(self.render([*messages[:i], other, *messages[i + 1 :]], False, tools), text)
        for n in range(len(self.opening), len(self.opening) // 2, -1):  # it may open a thought that the answer lacks
            if (found := text.rfind(self.opening[:n], earliest, start)) >= 0:
                return found + n
        return max(earliest, start)

    def answer_end(
        self,
        text: str,
        start: int,
        messages: Sequence[Message],
        i: int,
        tools: Optional[list],
        turn_end: Optional[str],
    ) -> int:
        """Where the stop token of answer `i` ends. If the template writes none, where the message ends."""
        content = stripped_content(messages[i])
        content_start = len(text) - len(text[start:].lstrip())
        content_end = content_start + len(content)
        if turn_end and content_only(messages[i]) and text.startswith(content, content_start):
            found = text.find(turn_end, content_end)
            before_it = self.frame[2].partition(turn_end)[0].strip()
            if found >= 0 and text[content_end:found].strip() in ("", before_it):
                return found + len(turn_end)
        part, limit = text, len(text)
        if i < len(messages) - 1:
            part = ""
            with suppress(UserError):
                part = self.render(messages[: i + 1], False, tools)
            limit = self.next_message_start(text, start, messages, i, tools=tools)
        is_prefix = bool(part) and text.startswith(part)
        if turn_end:  # the answer itself may contain one: the last one in the message closes it
            found = text.rfind(turn_end, start, len(part) if is_prefix else limit)
            if found < 0 and is_prefix:
                found = text.find(turn_end, len(part), limit)  # the template writes it before the next message
            if found >= 0:
                return found + len(turn_end)
        if is_prefix:
            return max(start, min(limit, len(part)))
        place, found = part.rfind(content), text.rfind(content, start, limit)
        if content and place >= 0 and found >= 0:  # what follows an answer depends on whether another message does
            rest = found + len(content)
            return rest + shared_length(part[place + len(content) :], text[rest:limit])
        n = bisect_left(range(len(part)), True, key=lambda n: part[len(part) - n - 1 :] not in text[start:limit])
        if re.search(r"\w", part[len(part) - n :]):  # the template dropped something before this, such as a thought
            return text.rfind(part[len(part) - n :], start, limit) + n
        return max(start, min(limit, shared_length(part, text)))

    def words_behind(
        self,
        text: str,
        end: int,
        messages: Sequence[Message],
        i: int,
        tools: Optional[list],
        turn_end: Optional[str],
    ) -> Optional[tuple[int, int]]:
        """Where the words of answer `i` stand if the template writes them behind the results of the answer's calls."""
        content = stripped_content(messages[i])
        if not content or not messages[i].get("tool_calls") or content not in text[end:]:
            return None
        place = len(text)
        with suppress(UserError):
            other = [*messages[:i], {**messages[i], "content": "\uffff"}, *messages[i + 1 :]]
            place = shared_length(self.render(other, False, tools), text)
        if place < end or not text.startswith(content, place):
            return None
        close = place + len(content)
        return place, close + len(turn_end) if turn_end and text.startswith(turn_end, close) else close

    def next_message_start(
        self, text: str, start: int, messages: Sequence[Message], i: int, tools: Optional[list]
    ) -> int:
        """Where the content of the first visible message after message `i` begins, or the end of the text."""
        limit = len(text)
        for j in range(i + 1, len(messages)):
            with suppress(UserError):
                other = [*messages[:j], {**messages[j], "content": "\uffff"}, *messages[j + 1 :]]
                limit = max(start, shared_length(self.render(other, False, tools), text))
                if limit < len(text):
                    break
        return limit

    @cached_property
    def opening(self) -> str:
        """What the template writes between a prompt and its answer."""
        with suppress(UserError):
            prompt, bare = self.prompt(PROBE[:1]), self.render(PROBE[:1], False)
            return prompt[len(bare) :] if prompt.startswith(bare) else ""
        return ""

    @cached_property
    def frame(self) -> tuple[str, str, str]:
        """What every prompt ends with, what precedes the content of the last answer, and what follows it."""
        try:
            prompts = [self.prompt([{"role": "user", "content": text}]) for text in ("a", "other (b)")]
            text = self.render(PROBE, False)
        except UserError:
            return "", "", ""
        if not text.startswith(prompts[0]) or ANSWER not in text:
            return "", "", ""
        shared = shared_length(prompts[0][::-1], prompts[1][::-1])
        between, _, after = text[len(prompts[0]) :].rpartition(ANSWER)
        return prompts[0][len(prompts[0]) - shared :], between, after

    def turn_end(self, special_tokens: Collection[str]) -> Optional[str]:
        """The special token that closes an answer, found by rendering some; None if the template writes none.

        It is the last of those that follow an answer directly, both at the end of a conversation and before another
        prompt. If there is none, it is the first one at the end, or else the one that the next prompt begins with.
        """
        tails = []
        for more in ((), ({"role": "user", "content": "b"}, PROBE[1])):
            tail = ""
            with suppress(UserError):
                tail = self.render([*PROBE, *more], False).partition(ANSWER)[2]
            tails.append(tail)
        last, middle = tails
        in_both = last[: shared_length(last, middle)] if middle else last
        closing = ""
        while (token := first_token(in_both, special_tokens)) and (not closing or in_both.startswith(token)):
            closing, in_both = token, in_both.partition(token)[2]
        following = first_token(middle, special_tokens)
        begins = following if middle.lstrip().startswith(following) else ""
        return closing or first_token(last, special_tokens) or begins or None


def first_token(text: str, tokens: Collection[str]) -> str:
    """The first of the tokens in a text, the longest of those at one place; empty if there is none."""
    found = [(text.find(token), -len(token), token) for token in tokens if token in text]
    return min(found)[2] if found else ""


def marked_parts(
    text: str, answers: list[tuple[int, int, int]], marks: list[tuple[int, str]], turn_end: Optional[str]
) -> list[tuple[int, int, int]]:
    """The parts of the answers that a template marks. What follows a stop token is not part of an answer, and the stop
    token is, whether or not it is marked. If the place of a mark is not known, all answers are returned."""
    parts = []
    for start, marked in marks:
        end = start + len(marked)
        if text[start:end] != marked:  # in a macro, whose text the template places later
            return answers
        owner = next((answer for answer in answers if start < answer[1]), None)
        if owner is not None:
            _, close, i = owner
            if turn_end and text.endswith(turn_end, 0, close) and not text[end : close - len(turn_end)].strip():
                end = close
            if start < end:
                parts.append((start, end, i))
    if parts and parts[-1][2] != answers[-1][2]:
        parts.append((answers[-1][1], *answers[-1][1:]))  # nothing of the last answer
    return parts or answers


def reason_of(error: BaseException) -> str:
    """What a template raised, in words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) or ("it takes too much memory" if isinstance(error, MemoryError) else type(error).__name__)


def shared_length(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    if b.startswith(a):
        return len(a)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def stripped_content(message: Message) -> str:
    """The content of a message without surrounding blanks, which some templates drop."""
    return str(message.get("content") or "").strip()


def content_only(message: Message) -> bool:
    """Whether an answer has neither tool calls nor reasoning."""
    return BESIDE_CONTENT.isdisjoint(message) or not any(message.get(key) for key in BESIDE_CONTENT)


class CallForm(NamedTuple):
    """The form in which a template reads messages with tool calls.

    Args:
        as_text: Whether arguments are JSON text instead of an object.
        empty: The `content` field of a message without content: missing, empty or null.
    """

    as_text: bool
    empty: dict[str, Any]


def template_message(message: Message, form: Optional[CallForm] = None) -> dict[str, Any]:
    """A message as templates expect it: without null fields and without fields for training only, with the `input`
    below the content, reasoning under all of its names, and tool calls in the given form."""
    fields = {k: v for k, v in message.items() if k not in INTERNAL and v is not None}
    if message.get("input"):
        fields["content"] = f"{message['content']}\n\n{message['input']}"
    if not BESIDE_CONTENT.isdisjoint(fields):
        reasoning = next((r for k in REASONING if isinstance(r := fields.get(k), str) and r), None)
        if reasoning is not None:
            fields = {**dict.fromkeys(REASONING, reasoning), **fields}
    if form is not None and fields.get("tool_calls"):
        fields["tool_calls"] = [call_in(form, call) for call in fields["tool_calls"]]
        if not fields.get("content"):
            fields = {k: v for k, v in fields.items() if k != "content"} | form.empty
    else:
        fields.setdefault("content", "")
    return fields


def renamed(call: Any) -> Any:
    """A tool call of another function. Other shapes than OpenAI's are returned unchanged."""
    function = call.get("function") if isinstance(call, Mapping) else None
    return {**call, "function": {**function, "name": "\uffff"}} if isinstance(function, Mapping) else call


def call_in(form: CallForm, call: Any) -> Any:
    """A tool call with its arguments in the given form. Other shapes than OpenAI's are returned unchanged."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if form.as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not form.as_text and isinstance(arguments, str):
        with suppress(ValueError):
            parsed = parse_json(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}}
