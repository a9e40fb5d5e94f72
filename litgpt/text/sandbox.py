"""A Jinja environment for chat templates. A template may come from a stranger: what it can reach, how long it runs, and
how much it produces are limited."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from typing import Any, Optional

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

SECONDS = 5  # time limit of a rendering
LARGEST = 10**7  # limit of characters, list entries, and numbers
MAX_JSON = 2**25  # characters that `tojson` may produce

DICT_METHODS = frozenset(dir(dict))
FAST_ATTRIBUTES = {
    *((LoopContext, name) for name in ("index", "index0", "first", "last", "length", "revindex", "revindex0")),
    *((str, name) for name in ("startswith", "endswith", "strip", "lstrip", "rstrip", "split")),
}
SHRINKING_FILTERS = frozenset(("trim", "length", "count", "first", "last", "upper", "lower", "default"))


class Marks:
    """The parts of a text that its template marks with `{% generation %}`.

    Attributes:
        spans: Where each part begins, and what it contains.
    """

    def __init__(self) -> None:
        self.length = 0  # of the text so far
        self.spans: list[tuple[int, str]] = []

    @contextmanager
    def collect(self, pieces: Iterable[str]) -> Iterator[Iterator[str]]:
        """The pieces of a text, whose marks are collected while they are read."""

        def counted() -> Iterator[str]:
            for piece in pieces:
                self.length += len(piece)
                yield piece

        token = COLLECTED.set(self)
        try:
            yield counted()
        finally:
            COLLECTED.reset(token)


COLLECTED: ContextVar[Optional[Marks]] = ContextVar("marks", default=None)


class Generation(Extension):
    """`{% generation %}` marks the answers in some templates. It prints what is inside, and has its own scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        if (marks := COLLECTED.get()) is not None:
            marks.spans.append((marks.length, text))
        return text


class TemplateNamespace(Namespace):
    """The `namespace` of templates. Like that of `transformers`, it takes no names that begin with an underscore."""

    def __init__(*args: Any, **fields: Any) -> None:  # `self` may be a field
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **fields).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no {name!r}, because the name begins with an underscore")
        super().__setitem__(name, value)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits, and with the settings, filters and functions of `transformers`.

    Set `until` before each rendering: the time, by `time.monotonic`, at which it has to end.
    """

    intercepted_binops = frozenset(("+", "*", "**"))
    until = math.inf

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = tojson
        growing = self.filters.keys() - SHRINKING_FILTERS
        self.filters |= {name: limited(self.filters[name]) for name in growing} | {"within_limits": within_limits}
        del self.globals["lipsum"]  # random words, as many as it is asked for
        self.globals |= {"raise_exception": raise_exception, "namespace": TemplateNamespace}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """A shortcut for attributes that templates read all the time and that the sandbox always allows."""
        if type(obj) is dict and attribute not in DICT_METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (type(obj), attribute) in FAST_ATTRIBUTES:
            return getattr(obj, attribute)
        if type(obj) is TemplateNamespace and not attribute.startswith("_"):
            with suppress(AttributeError):
                return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def _parse(self, *args: Any) -> nodes.Template:
        """Add a check of the time to each loop and macro, and a check of the size to each operand of `~`."""
        template = super()._parse(*args)
        for node in list[Any](template.find_all((nodes.For, nodes.Macro))):
            node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick")).set_lineno(node.lineno))
        for concat in template.find_all(nodes.Concat):
            concat.nodes = [nodes.Filter(part, "within_limits", [], [], None, None) for part in concat.nodes]
        template.set_lineno(1).set_environment(self)  # for the nodes that were added
        return template

    @property
    def tick(self) -> None:
        if time.monotonic() > self.until:
            raise TemplateError(f"it takes more than {SECONDS} seconds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operands(operator, left, right)
        return self.binop_table[operator](left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            within_limits(value)
        return within_limits(super().call(context, function, *args, **kwargs))

    def concat(self, pieces: Iterable[str]) -> str:
        texts = list(pieces)
        if sum(map(len, texts)) > LARGEST:
            raise TemplateError(f"it produces more than {LARGEST:,} characters")
        return "".join(texts)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter of that name. Raises `ValueError` for more text than any model reads: the indentation of nested lists
    can be a thousand times as long as the lists."""
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
    if indent is None:
        return json.dumps(x, **options)
    parts, size = list[str](), 0
    for part in json.JSONEncoder(indent=indent, **options).iterencode(x):
        parts.append(part)
        size += len(part)
        if size > MAX_JSON:
            raise ValueError(f"JSON of more than {MAX_JSON} characters")
    return "".join(parts)


def within_limits(value: Any) -> Any:
    """Return the value. Raises `ValueError` if it is too large."""
    size = value if isinstance(value, int) else size_of(value)
    if not -LARGEST <= size <= LARGEST:
        raise ValueError(f"it works with a number, text or list above {LARGEST:,}")
    return value


def size_of(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with limits on its arguments and its result."""

    @wraps(function)
    def guarded(*args: Any, **options: Any) -> Any:
        options = {name: within_limits(value) for name, value in options.items()}
        return within_limits(function(*map(within_limits, args), **options))

    return guarded


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raise `ValueError` if the result of an operator would be too large."""
    if operator == "+" and type(left) is type(right) is str and len(left) + len(right) <= LARGEST:
        return  # by far the most common case
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "+":
        size = size_of(left) + size_of(right)
    elif operator == "**":
        size = abs(left) ** min(abs(right), 64) if numbers else 0
    elif numbers:
        size = abs(left * right)
    else:
        size = max(size_of(left), size_of(right)) * next((n for n in (left, right) if isinstance(n, int)), 0)
    if size > (2**64 if numbers else LARGEST):
        raise ValueError(f"it makes something too large with {operator}")
