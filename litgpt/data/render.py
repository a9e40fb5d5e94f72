"""Renders rows in a prompt style, tokenizes them, and makes their loss masks."""

import contextlib
import gc
import hashlib
import inspect
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from litgpt.data.forms import SKIP, recognize, to_row
from litgpt.data.lost import Lookup
from litgpt.data.row_files import Rows
from litgpt.data.sources import RowSource, TextPiece
from litgpt.data.tokens import (
    ANSWER,
    IN_LOSS,
    Counts,
    TokenizedRows,
    TokenWriter,
    cache_folder,
    cached_tokens,
    read_tokens,
)
from litgpt.errors import UserError
from litgpt.text.prompts import PromptStyle, style_fields
from litgpt.text.tokenizer import Encoded, Tokenizer

if TYPE_CHECKING:
    from litgpt.data.base import DataModule

AT_ONCE, CHARACTERS = 4000, 4_000_000  # limits of a batch for the tokenizer: rows and characters


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

    def __post_init__(self) -> None:
        self.stops = self.tokenizer.stops(self.style)
        self.known_forms: dict[tuple, str] = {}
        self.lookup = Lookup(self.style)

    def tokens(
        self, sources: list[RowSource], on_progress: Callable[[int], None], opened: Optional[Rows] = None
    ) -> tuple[TokenizedRows, Counts, bool]:
        """The tokens of all rows of `sources`, their counts, and whether they came from the cache."""
        file = cache_folder() / f"{self.key(sources)}.safetensors"
        if found := cached_tokens(file):
            return *found, True
        writer = TokenWriter(file)
        collecting = gc.isenabled()
        gc.disable()  # there are no cycles to collect; searching for them takes a tenth of the time
        try:
            for number, source in enumerate(sources):
                before = len(writer.hashes)
                source, rows = source.fitted(opened if opened is not None and number == 0 else source.rows())
                self.add(source, rows, writer, on_progress)
                writer.counts.sources.append(len(writer.hashes) - before)
            writer.close()
        finally:
            writer.discard()
            if collecting:
                gc.enable()
        return *read_tokens(file), False

    def key(self, sources: list[RowSource]) -> str:
        """A hash of everything that the tokens depend on."""
        data, tokenizer = self.data, self.tokenizer
        parts = {
            "code": code_hash(),
            "sources": [[s.fingerprint(), Path(s.path).suffixes[-2:], s.columns, s.form] for s in sources],
            "set": [type(data).__name__, class_hash(type(data)), {k: str(v) for k, v in vars(data).items()}],
            "style": [style_fields(self.style), self.style.printed_times()],
            "tokenizer": [tokenizer.fingerprint(), tokenizer.bos_id, tokenizer.eos_id, sorted(self.stops)],
            "n_embeddings": tokenizer.n_embeddings,
            "trained": [self.mask_prompt, self.turn_end],
            "max_length": self.max_length,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()[:32]

    def attempt(self, counts: Counts, make: Callable[..., Any], *args: Any) -> Any:
        """`make(*args)`. If it fails and bad rows are to be skipped, count the row and return None."""
        try:
            return make(*args)
        except UserError as e:
            if self.data.on_bad_row == "error":
                raise with_remedy(e) from e
            counts.bad += 1
            return None

    def add(self, source: RowSource, rows: Rows, writer: TokenWriter, on_progress: Callable[[int], None]) -> None:
        """Write the rows of a source. The next batch is rendered while one is tokenized."""
        with ThreadPoolExecutor(1) as pool:
            pending: deque = deque()

            def write_oldest() -> None:
                examples, encoded = pending.popleft()
                for example, tokens in zip(examples, encoded.result()):
                    self.attempt(writer.counts, self.write, example, tokens, writer)

            def tokenize(examples: list[RenderedExample]) -> None:
                texts, special = [e.text for e in examples], [not e.own_special_tokens for e in examples]
                pending.append((examples, pool.submit(self.tokenizer.encode_batch, texts, special)))
                if len(pending) > 1:
                    write_oldest()

            examples: list[RenderedExample] = []
            n_characters = 0
            for where, raw in rows:
                writer.counts.rows += not isinstance(raw, TextPiece) or raw.first
                example = self.attempt(writer.counts, self.render, source, where, raw, writer.counts)
                if example is not None:
                    examples.append(example)
                    n_characters += len(example.text)
                    if len(examples) >= AT_ONCE or n_characters >= CHARACTERS:
                        tokenize(examples)
                        examples, n_characters = [], 0
                        on_progress(len(writer.hashes))
            tokenize(examples)
            while pending:
                write_oldest()

    def render(self, source: RowSource, where: str, raw: Any, counts: Counts) -> Optional[RenderedExample]:
        """The text of a raw row. If its label is false, count it and return None."""
        if isinstance(raw, TextPiece):
            counts.forms["document"] = counts.forms.get("document", 0) + raw.first
            span = (0, len(raw.text), True)
            return RenderedExample(
                where, raw.text, [span], own_special_tokens=not raw.first, closed=not raw.last, document=True
            )
        fields = self.data.fields(source, where, raw)
        form = "" if fields is None else source.form or self.form(fields, where, counts)
        row = None if fields is None else to_row(fields, form, where)
        if row is None:
            counts.skipped += 1
            return None
        counts.forms[form] = counts.forms.get(form, 0) + 1
        if row.text is not None:
            return RenderedExample(where, row.text, [(0, len(row.text), True)], own_special_tokens=False, closed=False)
        try:
            text, answers = self.style.render_row(row.messages, row.tools, self.turn_end)
        except UserError as e:
            raise UserError(f"{where}: {e}. Fix the row, or choose another --data.prompt_style.") from e
        for kind in self.lookup.lost(row.messages, row.tools):
            counts.lost[kind] = counts.lost.get(kind, 0) + 1
            counts.lost_at.setdefault(kind, where)
        last = answers[-1][2]
        spans = []
        for start, end, i in answers:
            if row.messages[i].get("_context"):
                continue
            in_loss = bool(row.messages[i].get("train", True)) and (self.data.train_on != "last" or i == last)
            spans.append((start, end, in_loss))
        own = self.style.own_special_tokens
        closed = own and bool(self.turn_end) and text[: answers[-1][1]].endswith(str(self.turn_end))
        return RenderedExample(where, text, spans, own, closed)

    def form(self, fields: Any, where: str, counts: Counts) -> str:
        """The form of a row. If it has none, the most frequent one, whose error then names what is missing."""
        shape = tuple((key, value is None) for key, value in fields.items()) if isinstance(fields, dict) else None
        if shape is not None and shape in self.known_forms:
            return self.known_forms[shape]
        try:
            form = recognize(fields, where)
        except UserError:
            if not counts.forms:
                raise
            return max(counts.forms, key=lambda form: counts.forms[form])
        if shape is not None:
            self.known_forms[shape] = form
        return form

    def write(self, example: RenderedExample, tokens: Encoded, writer: TokenWriter) -> None:
        """Make the loss mask, add a stop token if there is none, apply the length limit, and write the row."""
        ids, counts = tokens.ids, writer.counts
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
                    writer.add(ids[part], bytes(mask[part]))
            return
        if len(ids) > self.max_length:
            if self.data.too_long == "error":
                fix = "Raise --train.max_seq_length" if self.below_context else "Shorten the row"
                raise UserError(
                    f"{example.where} has {len(ids)} tokens. The limit is {self.max_length}. {fix}, or choose "
                    "--data.too_long cut or drop."
                )
            if self.data.too_long == "drop":
                counts.too_long += 1
                return
            counts.truncated += 1
            ids, mask = ids[: self.max_length], mask[: self.max_length]
        self.check_ids(example, ids)
        last = max(mask.rfind(IN_LOSS), mask.rfind(IN_LOSS | ANSWER))
        if last < 1:  # the first token is never a target
            counts.no_targets += 1
            return
        if ids[last] not in self.stops:
            counts.no_stop += not any(i in self.stops and bits & IN_LOSS for i, bits in zip(ids, mask))
        counts.two_bos += self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2
        writer.add(ids, bytes(mask))

    def check_ids(self, example: RenderedExample, ids: list[int]) -> None:
        try:
            self.tokenizer.check(ids)
        except UserError as e:
            raise UserError(f"{example.where}: {e}") from e


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
