"""Renders rows in a prompt style."""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from litgpt.data.columns import match
from litgpt.data.forms import FORMS, Row, Side, check_mapped, rename, to_row, to_sides
from litgpt.data.lost import EARLIER, LABEL, SPECIAL, Lookup, as_text
from litgpt.data.messages import SKIP, Messages, check_object
from litgpt.data.sources import RowSource, TextPiece
from litgpt.data.tokens import Counts, TokenChunk
from litgpt.errors import UserError
from litgpt.text.prompts import PromptStyle

if TYPE_CHECKING:
    from litgpt.data.data_module import DataModule

THREE_LETTERS = re.compile(r"(?:[^\W_]\W*){3}")  # or digits


@dataclass
class RenderedExample:
    """The text of a row.

    Args:
        where: The position of the row.
        text: Includes special tokens if `own_special_tokens`.
        spans: Start and end of each answer in the text, and whether it is trained on.
        own_special_tokens: Whether the prompt style writes the special tokens.
        closed: Whether no stop token is to be added: there is one already, or the document continues.
        document: Whether the text is split into as many rows as it needs.
        is_rejected: Whether the answer is a rejected or undesirable one.
        other: The conversation with the rejected answer of a pair.
    """

    where: str
    text: str
    spans: list[tuple[int, int, bool]]
    own_special_tokens: bool
    closed: bool
    document: bool = False
    is_rejected: bool = False
    other: Optional["RenderedExample"] = None

    @property
    def sequences(self) -> list["RenderedExample"]:
        return [self] if self.other is None else [self, self.other]


class RowRenderer:
    """Renders rows in a prompt style.

    Args:
        data: Its options say what is trained, and what happens to parts that the style does not show.
        style: The prompt style.
        turn_end: The token that ends an answer.
    """

    def __init__(self, data: "DataModule", style: PromptStyle, turn_end: Optional[str]) -> None:
        self.data, self.style, self.turn_end = data, style, turn_end
        self.known_forms: dict[tuple, tuple[str, dict[str, str]]] = {}  # by the keys of a row
        self.styles: dict[str, tuple[PromptStyle, Lookup]] = {}  # by the variables that a row passes to the template

    def render(self, source: RowSource, where: str, raw: Any, chunk: TokenChunk) -> list[RenderedExample]:
        """The text of a raw row, or nothing if it is not to be used, which is counted. Ranked answers make several
        pairs."""
        counts = chunk.counts
        if isinstance(raw, TextPiece):
            counts.forms["document"] = counts.forms.get("document", 0) + raw.first
            span = (0, len(raw.text), True)
            return [
                RenderedExample(
                    where, raw.text, [span], own_special_tokens=not raw.first, closed=not raw.last, document=True
                )
            ]
        for theirs in (source.columns or {}).values():
            if isinstance(raw, dict) and theirs in raw:
                count(counts.mapped, theirs)
        fields = self.data.fields(source, where, raw)
        if fields is None:
            counts.skipped += 1
            return []
        check_object(fields, where, "instruction and output")
        form, columns = self.form(source, fields, where, counts)
        if columns:
            fields = rename(fields, columns, where)
            counts.columns = {**columns, **counts.columns}
        check_mapped(fields, form, source.columns or {})
        sides: list[Side] = []
        if self.data.unit != "row":
            sides = to_sides(fields, form, where, self.data.unit)
        elif (row := to_row(fields, form, where)) is not None:
            sides = [(row, None)]
        if not sides:
            counts.skipped += 1
            return []
        count(counts.forms, form)
        for key, value in fields.items():
            if value is not None and key not in FORMS[form].used:
                count(counts.ignored, str(key))
        of_row = chunk if self.data.unit == "row" else TokenChunk(detailed=chunk.detailed)
        found = [self.render_sides(good, bad, where, of_row) for good, bad in sides]
        if of_row is not chunk:  # what both sides have counts once
            counts.add_row(of_row.counts)
            chunk.findings += [f for i, f in enumerate(of_row.findings) if f not in of_row.findings[:i]]
        return [example for example in found if example is not None]

    def render_sides(
        self, good: Optional[Row], bad: Optional[Row], where: str, chunk: TokenChunk
    ) -> Optional[RenderedExample]:
        """A conversation, or the two of a pair; None if a part of it is lost."""
        rendered = []
        for row in (row for row in (good, bad) if row is not None):
            if row.goes_on:
                count(chunk.counts.ignored, "messages after the last answer")
            if row.text is not None:
                span = (0, len(row.text), True)
                return RenderedExample(where, row.text, [span], own_special_tokens=False, closed=False)
            example = self.render_conversation(row, where, chunk)
            if example is None:
                return None
            example.is_rejected = row is bad
            rendered.append(example)
        rendered[0].other = rendered[1] if len(rendered) > 1 else None
        return rendered[0]

    def render_conversation(self, row: Row, where: str, chunk: TokenChunk) -> Optional[RenderedExample]:
        counts, messages, tools = chunk.counts, row.messages, row.tools
        style, lookup = self.style_for(row, where)
        if self.data.on_lost == "as_text":
            messages, tools = self.shown_as_text(style, lookup, row)
            counts.as_text += messages is not row.messages
        hidden = lookup.hidden(messages, tools)
        drops = self.data.on_lost == "drop_row" and any(map(is_lost, hidden))
        counts.dropped_lost += drops
        for kind in hidden:
            if kind.startswith(LABEL):
                count(counts.ignored, kind)
            elif not drops:
                count(counts.lost, kind)
                counts.lost_at.setdefault(kind, where)
            if is_lost(kind):
                chunk.note("lost", where, kind)
        if drops:
            return None
        try:
            text, answers = style.render_row(messages, tools, self.turn_end)
        except UserError as e:
            is_special = self.renders(style, *as_text(messages, tools, SPECIAL))
            if is_special and self.data.on_lost == "drop_row":
                counts.dropped_lost += 1
                chunk.note("lost", where, str(e))
                return None
            fix = "Pass --data.on_lost as_text or drop_row" if is_special else "Fix the row"
            raise UserError(f"{where}: {e}. {fix}, or choose another --data.prompt_style.") from e
        counts.short_prompts += not any(m["role"] == "user" and THREE_LETTERS.search(m["content"]) for m in messages)
        last = answers[-1][2]
        spans = []
        for start, end, i in answers:
            if messages[i].get("_context"):
                continue
            in_loss = bool(messages[i].get("train", True)) and (self.data.train_on != "last" or i == last)
            spans.append((start, end, in_loss))
        own = style.own_special_tokens
        closed = own and bool(self.turn_end) and text[: answers[-1][1]].endswith(str(self.turn_end))
        return RenderedExample(where, text, spans, own, closed)

    def shown_as_text(self, style: PromptStyle, lookup: Lookup, row: Row) -> tuple[Messages, Optional[list[Any]]]:
        """The messages and tools of a row, with texts in place of parts that the style does not show or refuses."""
        messages, tools = row.messages, row.tools
        for _ in range(2):  # definitions of tools become a system message, which may be lost as well
            if any(map(is_lost, lost := lookup.lost(messages, tools))):
                messages, tools = as_text(messages, tools, lost)
        return (messages, tools) if self.renders(style, messages, tools) else as_text(messages, tools, SPECIAL)

    def renders(self, style: PromptStyle, messages: Messages, tools: Optional[list[Any]]) -> bool:
        """Whether the style accepts a conversation."""
        try:
            style.render_row(messages, tools, self.turn_end)
        except UserError:
            return False
        return True

    def style_for(self, row: Row, where: str) -> tuple[PromptStyle, Lookup]:
        """The prompt style with what the row passes to it, and what that style shows."""
        key = json.dumps(row.variables, sort_keys=True) if row.variables else ""
        if key not in self.styles:
            try:
                style = self.style.with_variables(row.variables) if row.variables else self.style
            except UserError as e:
                raise UserError(f"{where}: {e}") from e
            self.styles[key] = style, Lookup(style)
        return self.styles[key]

    def form(self, source: RowSource, fields: Any, where: str, counts: Counts) -> tuple[str, dict[str, str]]:
        """The form of a row, and the columns to rename. If it has none, the most frequent form, whose error then names
        what is missing."""
        shape = (source.form, *((key, value is None) for key, value in fields.items()))
        if shape in self.known_forms:
            return self.known_forms[shape]
        try:
            found = match(fields, where, source.form, self.data.unit == "label" or source.has_labels)
        except UserError:
            if not counts.forms:
                raise
            return max(counts.forms, key=lambda form: counts.forms[form]), {}
        self.known_forms[shape] = found
        return found


def count(counter: dict[str, int], key: str) -> None:
    counter[key] = counter.get(key, 0) + 1


def is_lost(kind: str) -> bool:
    """Whether a part that the prompt style does not show must not be lost."""
    return kind != EARLIER and not kind.startswith(LABEL)


def with_remedy(error: UserError) -> UserError:
    """The error of a row, with a remedy unless it has one."""
    return error if "--data." in str(error) else UserError(f"{error} Fix the row, or {SKIP}")
