"""Rendering a checkpoint's own chat template, in the sandbox of jinja2, as `transformers` does."""

import datetime
import json
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import takewhile
from typing import Any, ClassVar, NamedTuple, Optional

from litgpt.errors import UserError, nearest
from litgpt.storage.files import parse_json

Message = Mapping[str, Any]  # `role` and `content`; the user's message of an instruction row may have an `input`

SECONDS, LARGEST = 5, 10**7  # that a rendering may take; characters or entries of what it makes, numbers it works with
DICT_METHODS = frozenset(dir(dict))
MOST_JSON = 2**25
NOW = "LITGPT_NOW"  # the environment variable that sets the clock of the templates
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates look for the same text
INTERNAL = ("input", "train", "_context")  # fields of messages that no template reads


def now() -> datetime.datetime:
    """The time that chat templates print: that of `clock_at`, else the local time.

    Raises:
        UserError: the environment variable does not hold a time.
    """
    value = os.environ.get(NOW)
    try:
        return datetime.datetime.fromisoformat(value) if value else datetime.datetime.now()
    except ValueError as e:
        raise UserError(f"{NOW}={value} is not a time. Write it as 2026-01-31 or 2026-01-31T12:00:00.") from e


@contextmanager
def clock_at(time: Optional[str] = None) -> Iterator[None]:
    """Let chat templates print one time within the block, in this process and in those that it starts.

    Args:
        time: In ISO format; by default the time at which the block begins.
    """
    before = os.environ.get(NOW)
    os.environ[NOW] = time or now().isoformat(timespec="seconds")
    try:
        yield
    finally:
        del os.environ[NOW]
        if before is not None:
            os.environ[NOW] = before


def tojson(x: Any, **options: Any) -> str:
    """The filter of that name. Raises `ValueError` for more text than any model reads: where lists are nested, their
    indentation is a thousand times as long as they are."""
    options = {"ensure_ascii": False, **options}
    if options.get("indent") is None:
        return json.dumps(x, **options)
    pieces, size = list[str](), 0
    for piece in json.JSONEncoder(**options).iterencode(x):
        pieces.append(piece)
        size += len(piece)
        if size > MOST_JSON:
            raise ValueError(f"JSON of more than {MOST_JSON} characters")
    return "".join(pieces)


class Rendered(NamedTuple):
    """A conversation as text.

    Args:
        text: All of it.
        answers: For each answer of the assistant: where it begins, where its stop token ends, and the number of its
            message.
    """

    text: str
    answers: list[tuple[int, int, int]]


class PromptStyle(ABC):
    """How messages become text. One of your own needs a `name` and a `prompt`.

    Attributes:
        name: What it is called on the screen and in `prompt_style.yaml`.
        own_special_tokens: Whether BOS and the stop tokens are part of the text; else the tokenizer adds BOS.
        named: The styles that `from_name` knows.
    """

    named: ClassVar[dict[str, "PromptStyle"]] = {}
    name: str
    own_special_tokens: bool = False

    @classmethod
    def from_name(cls, name: str) -> "PromptStyle":
        """A named style, such as alpaca. Raises `UserError` if there is none of this name."""
        known = PromptStyle.named
        if name not in known:
            raise UserError(f"There is no prompt style {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
        return known[name]

    def apply(self, prompt: str, *, sys_prompt: Optional[str] = None, input: str = "") -> str:
        """The text that the answer to a single prompt follows."""
        system = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
        return self.prompt([*system, {"role": "user", "content": prompt, "input": input}])

    @abstractmethod
    def prompt(self, messages: Sequence[Message], tools: Optional[list] = None) -> str:
        """The text that the answer to the last message follows."""

    def render_row(
        self, messages: Sequence[Message], tools: Optional[list] = None, turn_end: Optional[str] = None
    ) -> Rendered:
        """A whole conversation that ends with an answer, and where the assistant's words are. Training wants it."""
        raise UserError(f"The prompt style {self.name!r} is for prompts alone: it has no render_row to train with.")

    def turn_end(self, special_tokens: Collection[str]) -> Optional[str]:
        """The stop token that the style writes behind an answer, if it is another than the tokenizer's EOS."""
        return None

    @property
    def time_formats(self) -> list[str]:
        """The formats in which texts show the time at which they were rendered; none for most styles."""
        return []

    def printed_times(self) -> list[str]:
        """What texts show of the time now; usually a date, or nothing."""
        return [now().strftime(format) for format in self.time_formats]


@dataclass(frozen=True)
class ChatTemplate(PromptStyle):
    """A Jinja template.

    Args:
        template: The source.
        variables: What it may use beside the messages: `bos_token`, `eos_token` and so on.
        name: What it is called on the screen and in `prompt_style.yaml`.
        for_tools: The template for conversations with tools, where the checkpoint has another one for them.
    """

    template: str
    variables: Mapping[str, str]
    name: str = "chat"
    for_tools: Optional["ChatTemplate"] = None
    own_special_tokens = True  # BOS and the stop tokens are part of the text

    @cached_property
    def compiled(self) -> Any:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.runtime import LoopContext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace

        class Generation(Extension):
            """`{% generation %}` marks the answers in some templates; it prints what is inside."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        class Environment(ImmutableSandboxedEnvironment):
            """The sandbox, with a short way to what most templates ask for all the time and it always allows: the keys
            of plain dicts, and what loops, namespaces and texts have."""

            def getattr(self, obj: Any, attribute: str) -> Any:
                if type(obj) is dict and attribute not in DICT_METHODS:
                    return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
                if (type(obj), attribute) in allowed:
                    return getattr(obj, attribute)
                if type(obj) is Namespace and not attribute.startswith("_"):
                    with suppress(AttributeError):
                        return getattr(obj, attribute)
                return super().getattr(obj, attribute)

            # A template may come from a stranger: it gets a limit of time, and of what it makes.

            intercepted_binops = frozenset(("+", "*", "**"))
            until = math.inf  # when a rendering has to end

            def _parse(self, *args: Any) -> nodes.Template:
                template = super()._parse(*args)
                for node in list[Any](template.find_all((nodes.For, nodes.Macro))):
                    node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick")).set_lineno(node.lineno))
                for joined in template.find_all(nodes.Concat):
                    joined.nodes = [nodes.Filter(part, "bounded", [], [], None, None) for part in joined.nodes]
                template.set_lineno(1).set_environment(self)  # of what is new
                return template

            @property
            def tick(self) -> None:
                if time.monotonic() > self.until:
                    raise jinja2.TemplateError(f"it takes more than {SECONDS} seconds")

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                check_operands(operator, left, right)
                return self.binop_table[operator](left, right)

            def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
                for value in (*args, *kwargs.values()):
                    bounded(value)
                return bounded(super().call(context, function, *args, **kwargs))

            def concat(self, pieces: Iterable[str]) -> str:
                found = list(pieces)
                if sum(map(len, found)) > LARGEST:
                    raise jinja2.TemplateError(f"it makes more than {LARGEST:,} characters")
                return "".join(found)

        def guarded(function: Any) -> Any:
            @wraps(function)
            def guard(*args: Any, **options: Any) -> Any:
                return bounded(function(*map(bounded, args), **{k: bounded(v) for k, v in options.items()}))

            return guard

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        of_loops = ("index", "index0", "first", "last", "length", "revindex", "revindex0")
        of_texts = ("startswith", "endswith", "strip", "lstrip", "rstrip", "split")
        allowed = {(LoopContext, name) for name in of_loops} | {(str, name) for name in of_texts}
        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.filters["tojson"] = tojson
        growing = environment.filters.keys() - {
            *("trim", "length", "count", "first", "last", "upper", "lower", "default")
        }
        environment.filters |= {name: guarded(environment.filters[name]) for name in growing} | {"bounded": bounded}
        del environment.globals["lipsum"]  # words at random, as many as it is asked for
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda format: now().strftime(format)
        try:
            template = environment.from_string(self.template)
        except Exception as e:  # of Python's compiler, too
            raise UserError(f"The chat template is not valid: {reason_of(e)}.") from e
        template.globals = dict(template.globals)  # copied for each rendering, which a chain of dicts makes slow
        return template

    @cached_property
    def time_formats(self) -> list[str]:
        """The formats in the template; that of the whole time where they are not literals."""
        uses = re.findall(r"\bstrftime_now\b(?!\s+is\b)", self.template)
        literals = re.findall(r"\bstrftime_now\s*\(\s*(['\"])(.*?)\1\s*\)", self.template)
        return [text for _, text in literals] if len(literals) == len(uses) else ["%Y-%m-%dT%H:%M:%S"]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Optional[list] = None) -> str:
        """The text of a conversation.

        Raises:
            UserError: the template refuses it; its own words are in the message.
        """
        if tools and self.for_tools:
            return self.for_tools.render(messages, add_generation_prompt, tools)
        calls = any(message.get("tool_calls") for message in messages)
        return self.filled(
            [plain(m, self.call_form if calls else None) for m in messages], add_generation_prompt, tools
        )

    def filled(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Optional[list] = None) -> str:
        """The text of messages that are as this template reads them."""
        self.compiled.environment.until = time.monotonic() + SECONDS
        try:
            return self.compiled.render(
                messages=messages,
                tools=tools,
                seqlens=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as e:  # an expression may raise anything
            raise UserError(f"the chat template refuses these messages: {reason_of(e)}") from e

    @cached_property
    def call_form(self) -> "CallForm":
        """How this template shows a tool call, found by trying the forms. Where several work, the first one wins:
        arguments as an object, which `transformers` recommends, and no content."""
        call = {"type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}
        said = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", **call}]}
        tool = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}

        def score(form: CallForm) -> int:
            best = -1  # the template refuses it
            for tools in (None, [tool]):
                with suppress(UserError):
                    text = self.filled([{"role": "user", "content": "a"}, plain(said, form)], False, tools)
                    shown = "probe" in text and "key" in text and "value" in text
                    clean = "&#34;" not in text and re.search(r'"key"\s*:\s*"value"', text) is not None
                    best = max(best, shown + (shown and clean))
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
        """A whole conversation, and where the assistant's words are.

        An answer begins behind the prompt before it and ends with the `turn_end` that closes it: what the template
        writes after that (a line break, say) belongs to nobody.
        """
        if tools and self.for_tools:
            return self.for_tools.render_row(messages, tools, turn_end)
        whole = self.render(messages, False, tools)
        answers = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self.start(whole, messages, i, tools)
                answers.append((start, self.end(whole, start, messages, i, tools, turn_end), i))
        return Rendered(whole, answers)

    def start(self, whole: str, messages: Sequence[Message], i: int, tools: Optional[list]) -> int:
        """Where answer `i` begins. If the text does not begin with the prompt (the template writes something else once
        an answer follows, or nothing stands before it), that is where another answer would make a difference."""
        if i == len(messages) - 1 and (found := self.quick_start(whole, words_of(messages[i]))) is not None:
            return found
        with suppress(UserError):
            prompt = self.prompt(messages[:i], tools)
            if whole.startswith(prompt):
                return len(prompt)
        other = [*messages[:i], {"role": "assistant", "content": "\uffff"}, *messages[i + 1 :]]
        return shared_length(self.render(other, False, tools), whole)

    def end(
        self,
        whole: str,
        start: int,
        messages: Sequence[Message],
        i: int,
        tools: Optional[list],
        turn_end: Optional[str],
    ) -> int:
        """Where the stop token of answer `i` ends, which begins at `start`; without one, where its message ends."""
        words, more = words_of(messages[i]), any(messages[i].get(key) for key in ("tool_calls", *REASONING))
        first = len(whole) - len(whole[start:].lstrip())
        if turn_end and not more and whole.startswith(words, first):
            found = whole.find(turn_end, first + len(words))
            if found >= 0 and not whole[first + len(words) : found].strip():
                return found + len(turn_end)
        part, limit = whole, len(whole)
        if i < len(messages) - 1:
            part = ""
            with suppress(UserError):
                part = self.render(messages[: i + 1], False, tools)
            for j in range(i + 1, len(messages)):  # no message that follows is part of it, wherever the next stop is
                with suppress(UserError):
                    other = [*messages[:j], {**messages[j], "content": "\uffff"}, *messages[j + 1 :]]
                    limit = max(start, shared_length(self.render(other, False, tools), whole))
                    if limit < len(whole):
                        break
        if turn_end:  # the answer may hold one itself: the last one in its message closes it
            clear = bool(part) and whole.startswith(part)
            found = whole.rfind(turn_end, start, len(part) if clear else limit)
            if found < 0 and clear:
                found = whole.find(turn_end, len(part), limit)  # it stands between this message and the next
            if found >= 0:
                return found + len(turn_end)
        return max(start, min(limit, shared_length(part, whole)))

    def quick_start(self, whole: str, words: str) -> Optional[int]:
        """Where the last answer begins, seen from what the template writes around every answer, without rendering the
        prompt again. None if the text does not end in that way."""
        before, between, after = self.frame
        end = between + words + after
        return len(whole) - len(end) if before and words and whole.endswith(before + end) else None

    @cached_property
    def frame(self) -> tuple[str, str, str]:
        """What ends every prompt, and what stands between it and the words of the last answer, and behind these."""
        try:
            prompts = [self.prompt([{"role": "user", "content": text}]) for text in ("a", "other (b)")]
            whole = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "(answer)"}], False)
        except UserError:
            return "", "", ""
        if not whole.startswith(prompts[0]) or "(answer)" not in whole:
            return "", "", ""
        shared = shared_length(prompts[0][::-1], prompts[1][::-1])
        between, _, after = whole[len(prompts[0]) :].rpartition("(answer)")
        return prompts[0][len(prompts[0]) - shared :], between, after

    def turn_end(self, special_tokens: Collection[str]) -> Optional[str]:
        """The special token that closes an answer, found by rendering one; None if the template writes none."""
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "(answer)"}], False)
        except UserError:
            return None
        tail = text.rpartition("(answer)")[2]
        found = [(tail.find(token), -len(token), token) for token in special_tokens if token in tail]
        return min(found)[2] if found else None


def bounded(value: Any) -> Any:
    """A value that a template works with, unless it is too large. Raises `ValueError`."""
    size = value if isinstance(value, int) else len(value) if isinstance(value, (str, list, tuple)) else 0
    if not -LARGEST <= size <= LARGEST:
        raise ValueError(f"it works with a number, text or list above {LARGEST:,}")
    return value


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raise `ValueError` where the result of an operator would be too large."""
    if operator == "+" and type(left) is type(right) is str and len(left) + len(right) <= LARGEST:
        return  # what templates do all the time
    numbers = isinstance(left, int) and isinstance(right, int)
    sizes = [len(v) if isinstance(v, (str, list, tuple)) else 0 for v in (left, right)]
    if operator == "+":
        size = sum(sizes)
    elif operator == "**":
        size = abs(left) ** min(abs(right), 64) if numbers else 0
    elif numbers:
        size = abs(left * right)
    else:
        size = max(sizes) * next((n for n in (left, right) if isinstance(n, int)), 0)
    if size > (2**64 if numbers else LARGEST):
        raise ValueError(f"it makes something too large with {operator}")


def reason_of(error: BaseException) -> str:
    """What a template raised, in words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) or ("it takes too much memory" if isinstance(error, MemoryError) else type(error).__name__)


def shared_length(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning on."""
    if b.startswith(a):
        return len(a)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def words_of(message: Message) -> str:
    """The content of a message without the blanks around it, which some templates drop."""
    return str(message.get("content") or "").strip()


class CallForm(NamedTuple):
    """What a message with tool calls looks like for a template.

    Args:
        as_text: Whether arguments are JSON text; otherwise they are an object.
        empty: The content of a message that has none: missing, empty or null.
    """

    as_text: bool
    empty: dict[str, Any]


def plain(message: Message, form: Optional[CallForm] = None) -> dict[str, Any]:
    """A message as templates expect it: without fields that are null, an `input` below the content, reasoning under all
    its names, tool calls in the form that the template can show, and without what only training reads."""
    fields = {k: v for k, v in message.items() if k not in INTERNAL and v is not None}
    if message.get("input"):
        fields["content"] = f"{message['content']}\n\n{message['input']}"
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


def call_in(form: CallForm, call: Any) -> Any:
    """A tool call with its arguments in a form. What is not a call of OpenAI's form stays as it is."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if form.as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not form.as_text and isinstance(arguments, str):
        with suppress(ValueError):
            found = parse_json(arguments)
            arguments = found if isinstance(found, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}}
