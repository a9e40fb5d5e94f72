"""Renders rows in a prompt style, tokenizes them, and makes their loss masks."""

import contextlib
import gc
import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from litgpt.data.cache import cache_folder, cache_limit, shrink_cache
from litgpt.data.columns import match
from litgpt.data.forms import FORMS, SKIP, Messages, Row, check_mapped, rename, to_row
from litgpt.data.lost import EARLIER, LABEL, SPECIAL, Lookup, as_text
from litgpt.data.row_files import Rows
from litgpt.data.sources import RowSource, TextPiece
from litgpt.data.tokens import (
    ANSWER,
    IN_LOSS,
    Counts,
    Details,
    Finding,
    TokenChunk,
    TokenizedRows,
    TokenWriter,
    cached_tokens,
    read_tokens,
)
from litgpt.data.workers import Workers
from litgpt.errors import UserError
from litgpt.text.prompts import PromptStyle, style_fields
from litgpt.text.tokenizer import Encoded, Tokenizer

if TYPE_CHECKING:
    from litgpt.data.base import DataModule

Progress = Callable[[int, Optional[int]], None]  # called with the number of rows so far and, if known, of all rows
THREE_LETTERS = re.compile(r"(?:[^\W_]\W*){3}")  # or digits
AT_ONCE, CHARACTERS = 1000, 4_000_000  # limits of a batch: rows and characters


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
    """

    where: str
    text: str
    spans: list[tuple[int, int, bool]]
    own_special_tokens: bool
    closed: bool
    document: bool = False


@dataclass
class TokenMaker:
    """Renders and tokenizes rows, or takes their tokens from the cache. See `TokenizedDataset` for the fields."""

    data: "DataModule"
    tokenizer: Tokenizer
    style: PromptStyle
    turn_end: Optional[str]
    mask_prompt: bool
    max_length: int
    below_context: bool
    details: Optional[Details] = None

    def __post_init__(self) -> None:
        self.stops = self.tokenizer.stops(self.style)
        self.known_forms: dict[tuple, tuple[str, dict[str, str]]] = {}
        self.styles: dict[str, tuple[PromptStyle, Lookup]] = {}
        self.skips = self.data.on_bad_row == "skip" or self.details is not None

    def tokens(
        self, sources: list[RowSource], on_progress: Progress, opened: Optional[Rows] = None
    ) -> tuple[TokenizedRows, list[Counts], bool]:
        """The tokens of all rows of `sources`, the counts of each source, and whether they came from the cache."""
        fingerprints = [source.fingerprint() for source in sources]
        file = cache_folder() / f"{self.key(sources, [digest for digest, _ in fingerprints])}.safetensors"
        if self.details is None and (found := cached_tokens(file)):
            return *found, True
        n_rows = sum(n for _, n in fingerprints) if all(n for _, n in fingerprints) else None
        limit = cache_limit()
        writer = TokenWriter(file)
        collecting = gc.isenabled()
        gc.disable()  # there are no cycles to collect; searching for them takes a tenth of the time
        try:
            with Workers(self.process) as workers:
                fits = False
                for number, source in enumerate(sources):
                    source, rows = source.fitted(opened if opened is not None and number == 0 else source.rows())
                    fits = fits or source.columns is not None
                    self.add(source, rows, writer, workers, lambda n: on_progress(n, n_rows))
                asked = next((s.columns for s in sources if s.columns), None)
                if asked and not fits and opened is not None:
                    raise UserError(f"--data.columns: none of the files has {', '.join(asked.values())}.")
            writer.close()
            shrink_cache(file, limit)
        finally:
            writer.discard()
            if collecting:
                gc.enable()
        return *read_tokens(file), False

    def key(self, sources: list[RowSource], fingerprints: list[str]) -> str:
        """A hash of everything that the tokens depend on."""
        data, tokenizer = self.data, self.tokenizer
        parts = {
            "code": code_hash(),
            "sources": [
                [digest, Path(s.path).suffixes[-2:], s.columns, s.form, s.limit]
                for digest, s in zip(fingerprints, sources)
            ],
            "set": [type(data).__name__, class_hash(type(data)), {k: str(v) for k, v in vars(data).items()}],
            "style": [style_fields(self.style), self.style.printed_times()],
            "tokenizer": [tokenizer.fingerprint(), tokenizer.bos_id, tokenizer.eos_id, sorted(self.stops)],
            "n_embeddings": tokenizer.n_embeddings,
            "trained": [self.mask_prompt, self.turn_end],
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()[:32]

    def add(
        self,
        source: RowSource,
        rows: Rows,
        writer: TokenWriter,
        workers: Workers,
        on_progress: Callable[[int], None],
    ) -> None:
        """Write the rows of a source."""
        n_before = sum(counts.rows for counts in writer.counts)
        writer.counts.append(Counts())
        for chunk in workers.map((source, batch) for batch in batched(rows)):
            if chunk.error:
                raise with_remedy(chunk.error)
            writer.add(chunk)
            if self.details is not None:
                self.details.add(source, chunk)
            on_progress(n_before + writer.counts[-1].rows)

    def process(self, source: RowSource, rows: list[tuple[str, Any]]) -> TokenChunk:
        """Render and tokenize some rows."""
        chunk = TokenChunk()
        examples: list[RenderedExample] = []
        try:
            for where, raw in rows:
                chunk.counts.rows += not isinstance(raw, TextPiece) or raw.first
                example = self.attempt(chunk, where, self.render, source, where, raw, chunk)
                if example is not None:
                    examples.append(example)
            n = 0
            while examples:  # texts may be much longer than their rows
                lengths = itertools.accumulate(len(example.text) for example in examples)
                n = max(1, sum(1 for length in lengths if length <= CHARACTERS))
                some, examples = examples[:n], examples[n:]
                texts, special = [e.text for e in some], [not e.own_special_tokens for e in some]
                for example, tokens in zip(some, self.tokenizer.encode_batch(texts, special)):
                    self.attempt(chunk, example.where, self.write, example, tokens, chunk)
        except UserError as e:
            chunk.error = e
        return chunk

    def attempt(self, chunk: TokenChunk, where: str, make: Callable[..., Any], *args: Any) -> Any:
        """`make(*args)`. If it fails and bad rows are to be skipped, count the row and return None."""
        try:
            return make(*args)
        except UserError as e:
            if not self.skips:
                raise
            chunk.counts.bad += 1
            self.note(chunk, "bad", where, str(e))
            return None

    def note(self, chunk: TokenChunk, kind: str, where: str, reason: str) -> None:
        if self.details is not None:
            chunk.findings.append(Finding(kind, where, reason))

    def render(self, source: RowSource, where: str, raw: Any, chunk: TokenChunk) -> Optional[RenderedExample]:
        """The text of a raw row, or None if it is not to be used, which is counted."""
        counts = chunk.counts
        if isinstance(raw, TextPiece):
            counts.forms["document"] = counts.forms.get("document", 0) + raw.first
            span = (0, len(raw.text), True)
            return RenderedExample(
                where, raw.text, [span], own_special_tokens=not raw.first, closed=not raw.last, document=True
            )
        fields = self.data.fields(source, where, raw)
        if fields is None:
            counts.skipped += 1
            return None
        form, columns = self.form(source, fields, where, counts)
        if columns:
            fields = rename(fields, columns, where)
            counts.columns = {**columns, **counts.columns}
        check_mapped(fields, form, source.columns or {})
        row = to_row(fields, form, where)
        if row is None:
            counts.skipped += 1
            return None
        count(counts.forms, form)
        for key, value in fields.items():
            if value is not None and not FORMS[form].uses(key):
                count(counts.ignored, str(key))
        if row.text is not None:
            return RenderedExample(where, row.text, [(0, len(row.text), True)], own_special_tokens=False, closed=False)
        return self.render_conversation(row, where, chunk)

    def render_conversation(self, row: Row, where: str, chunk: TokenChunk) -> Optional[RenderedExample]:
        counts, messages, tools = chunk.counts, row.messages, row.tools
        style, lookup = self.style_for(row)
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
                self.note(chunk, "lost", where, kind)
        if drops:
            return None
        try:
            text, answers = style.render_row(messages, tools, self.turn_end)
        except UserError as e:
            raise UserError(f"{where}: {e}. Fix the row, or choose another --data.prompt_style.") from e
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
        try:
            style.render_row(messages, tools, self.turn_end)
        except UserError:
            messages, tools = as_text(messages, tools, SPECIAL)
        return messages, tools

    def style_for(self, row: Row) -> tuple[PromptStyle, Lookup]:
        """The prompt style with what the row passes to it, and what that style shows."""
        key = json.dumps(row.variables, sort_keys=True) if row.variables else ""
        if key not in self.styles:
            style = self.style.with_variables(row.variables) if row.variables else self.style
            self.styles[key] = style, Lookup(style)
        return self.styles[key]

    def form(self, source: RowSource, fields: Any, where: str, counts: Counts) -> tuple[str, dict[str, str]]:
        """The form of a row, and the columns to rename. If it has none, the most frequent form, whose error then names
        what is missing."""
        shape = (source.form, *((key, value is None) for key, value in fields.items()))
        if shape in self.known_forms:
            return self.known_forms[shape]
        try:
            found = match(fields, where, source.form)
        except UserError:
            if not counts.forms:
                raise
            return max(counts.forms, key=lambda form: counts.forms[form]), {}
        self.known_forms[shape] = found
        return found

    def write(self, example: RenderedExample, tokens: Encoded, chunk: TokenChunk) -> None:
        """Make the loss mask, add a stop token if there is none, apply the length limit, and write the row."""
        ids, counts = tokens.ids, chunk.counts
        mask = bytearray(b"\0" if self.mask_prompt else bytes([IN_LOSS])) * len(ids)
        for start, end, in_loss in example.spans:
            first, stop = tokens.span(start, end)
            mask[first:stop] = bytes([ANSWER | (IN_LOSS if in_loss else 0)]) * (stop - first)
        eos = self.tokenizer.eos_id
        if not example.closed and eos is not None:
            if ids[-1:] != [eos]:  # some tokenizers add it by themselves
                ids = [*ids, eos]
                mask.append(0)
            mask[-1] = ANSWER | (IN_LOSS if example.spans[-1][2] else 0)
        if example.document:
            self.check_ids(example, ids)
            for start in range(0, len(ids), self.max_length):
                part = slice(start, start + self.max_length)
                if len(ids[part]) > 1:
                    chunk.add(ids[part], bytes(mask[part]))
                    if self.details is not None:
                        chunk.positions.append(example.where)
                        chunk.full_lengths.append(len(ids[part]))
            return
        n_tokens = len(ids)
        if self.details is not None:
            chunk.full_lengths.append(n_tokens)
        if n_tokens > self.max_length:
            if self.data.too_long == "error":
                fix = "Raise --train.max_seq_length" if self.below_context else "Shorten the row"
                raise UserError(
                    f"{example.where} has {len(ids)} tokens. The limit is {self.max_length}. {fix}, or choose "
                    "--data.too_long cut or drop."
                )
            if self.data.too_long == "drop":
                counts.too_long += 1
                self.note(chunk, "truncated", example.where, f"{n_tokens} tokens; the limit is {self.max_length}")
                return
            counts.truncated += 1
            self.note(chunk, "truncated", example.where, f"{n_tokens} tokens; the limit is {self.max_length}")
            ids, mask = ids[: self.max_length], mask[: self.max_length]
        self.check_ids(example, ids)
        last = max(mask.rfind(IN_LOSS), mask.rfind(IN_LOSS | ANSWER))
        if last < 1:  # the first token is never a target
            counts.no_targets += 1
            return
        if ids[last] not in self.stops:
            counts.no_stop += not any(i in self.stops and bits & IN_LOSS for i, bits in zip(ids, mask))
        counts.two_bos += self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2
        chunk.add(ids, bytes(mask))
        if self.details is not None:
            chunk.positions.append(example.where)

    def check_ids(self, example: RenderedExample, ids: list[int]) -> None:
        try:
            self.tokenizer.check(ids)
        except UserError as e:
            raise UserError(f"{example.where}: {e}") from e


def count(counter: dict[str, int], key: str) -> None:
    counter[key] = counter.get(key, 0) + 1


def is_lost(kind: str) -> bool:
    """Whether a part that the prompt style does not show must not be lost."""
    return kind != EARLIER and not kind.startswith(LABEL)


def batched(rows: Rows) -> Iterator[list[tuple[str, Any]]]:
    batch: list[tuple[str, Any]] = []
    n_characters = 0
    for row in rows:
        batch.append(row)
        n_characters += n_characters_of(row[1])
        if len(batch) >= AT_ONCE or n_characters >= CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def n_characters_of(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(n_characters_of, value.values()))
    if isinstance(value, list):
        return sum(map(n_characters_of, value))
    return len(value.text) if isinstance(value, TextPiece) else 1


@cache
def code_hash() -> str:
    """A hash of the code that makes tokens, and of the versions of the packages that it uses."""
    litgpt = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted([*(litgpt / "data").glob("*.py"), *(litgpt / "text").iterdir()]):
        digest.update(file.read_bytes() if file.is_file() else b"")
    digest.update(" ".join(map(version, ("jinja2", "sentencepiece", "tokenizers"))).encode())
    return digest.hexdigest()


def class_hash(data_class: type) -> str:
    """A hash of the source files of a data set, which may be the user's own, and of its base classes."""
    digest = hashlib.sha256()
    for base in data_class.__mro__:
        with contextlib.suppress(TypeError, OSError):  # built in, or defined in an interactive session
            digest.update(Path(inspect.getfile(base)).read_bytes())
    return digest.hexdigest()


def with_remedy(error: UserError) -> UserError:
    """The error of a row, with a remedy unless it has one."""
    return error if "--data." in str(error) else UserError(f"{error} Fix the row, or {SKIP}")
