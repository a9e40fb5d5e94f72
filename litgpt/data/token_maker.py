"""Tokens of rows: rendered, tokenized, and marked, or taken from the cache."""

import contextlib
import gc
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from litgpt.data.cache import cache_folder, cache_limit, shrink_cache
from litgpt.data.forms import SHARED
from litgpt.data.render import RenderedExample, RowRenderer, with_remedy
from litgpt.data.row_files import Rows
from litgpt.data.sources import RowSource, TextPiece
from litgpt.data.tokens import (
    ANSWER,
    IN_LOSS,
    REJECTED,
    Counts,
    Details,
    TokenChunk,
    TokenizedRows,
    TokenWriter,
    cached_tokens,
    read_tokens,
)
from litgpt.data.workers import Workers
from litgpt.errors import UserError
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompts import PromptStyle, style_fields
from litgpt.text.styles import PUBLIC
from litgpt.text.tokenizer import Encoded, Tokenizer

if TYPE_CHECKING:
    from litgpt.data.data_module import DataModule

Progress = Callable[[int, Optional[int]], None]  # called with the number of rows so far and, if known, of all rows
AT_ONCE, CHARACTERS = 1000, 4_000_000  # limits of a batch: rows and characters


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
        self.renderer = RowRenderer(self.data, self.style, self.turn_end)
        self.skips = self.data.on_bad_row == "skip" or self.details is not None

    def tokens(
        self, sources: list[RowSource], on_progress: Progress, opened: Optional[Rows] = None
    ) -> tuple[TokenizedRows, list[Counts], bool]:
        """The tokens of all rows of `sources`, the counts of each source, and whether they came from the cache."""
        fingerprints = [source.fingerprint() for source in sources]
        file = cache_folder() / f"{self.key(sources, [digest for digest, _ in fingerprints])}.safetensors"
        found = cached_tokens(file) if self.details is None else None
        if found and (self.skips or not any(counts.bad for counts in found[1])):  # a check skips bad rows, too
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
                optional = [pair for s in sources for pair in (s.columns or {}).items() if pair[0] in SHARED]
                for ours, theirs in optional if opened is not None else ():
                    if not any(theirs in counts.mapped for counts in writer.counts):
                        raise UserError(f"--data.columns {ours}: no row has {theirs}.")
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
            "style": [style_fields(self.style), style_hash(self.style), self.style.printed_times()],
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
        chunk = TokenChunk(detailed=self.details is not None)
        examples: list[RenderedExample] = []
        try:
            for where, raw in rows:
                chunk.counts.rows += not isinstance(raw, TextPiece) or raw.first
                examples += self.attempt(chunk, where, self.renderer.render, source, where, raw, chunk) or []
            n = 0
            while examples:  # texts may be much longer than their rows
                lengths = itertools.accumulate(len(example.text) for example in examples)
                n = max(1, sum(1 for length in lengths if length <= CHARACTERS))
                some, examples = examples[:n], examples[n:]
                sequences = [sequence for example in some for sequence in example.sequences]
                texts, special = [s.text for s in sequences], [not s.own_special_tokens for s in sequences]
                encoded = iter(self.tokenizer.encode_batch(texts, special))
                for example in some:
                    tokens = [next(encoded) for _ in example.sequences]
                    write = self.write if self.data.unit == "row" else self.write_sides
                    self.attempt(chunk, example.where, write, example, tokens, chunk)
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
            chunk.note("bad", where, str(e))
            return None

    def masked(self, example: RenderedExample, tokens: Encoded) -> tuple[list[int], bytearray]:
        """The ids and the loss mask of a text, with a stop token if it has none."""
        ids = tokens.ids
        is_masked = self.mask_prompt or example.is_rejected
        mask = bytearray(b"\0" if is_masked else bytes([IN_LOSS])) * len(ids)
        for start, end, in_loss in example.spans:
            first, stop = tokens.span(start, end)
            mask[first:stop] = bytes([ANSWER | (IN_LOSS if in_loss else 0)]) * (stop - first)
        eos = self.tokenizer.eos_id
        if not example.closed and eos is not None:
            if not ids or ids[-1] not in self.stops:  # some tokenizers add EOS by themselves
                ids = [*ids, eos]
                mask.append(0)
            mask[-1] = ANSWER | (IN_LOSS if example.spans[-1][2] else 0)
        return ids, mask

    def write_sides(self, example: RenderedExample, tokens: list[Encoded], chunk: TokenChunk) -> None:
        """Write a pair, or an answer with a label. If a sequence is over the length limit, the row is dropped: a
        truncated answer would lose its stop token."""
        counts, sides = chunk.counts, [self.masked(*side) for side in zip(example.sequences, tokens)]
        for ids, _ in sides:
            self.check_ids(example, ids)
            chunk.measure(len(ids))
        if (n_tokens := max(len(ids) for ids, _ in sides)) > self.max_length:
            if self.data.too_long == "error":
                raise self.too_long(example, n_tokens)
            chunk.note("truncated", example.where, f"{n_tokens} tokens; the limit is {self.max_length}")
            counts.too_long += 1
            return
        answers = [[i for i, bits in zip(*side) if bits & IN_LOSS and bits & ANSWER] for side in sides]
        if not all(answers):
            counts.no_targets += 1
            return
        if len(sides) == 2 and sides[0][0] == sides[1][0]:
            chunk.note("identical", example.where, "both answers are the same")
            counts.identical += 1
            return
        counts.no_stop += any(answer[-1] not in self.stops for answer in answers)
        bos = [self.tokenizer.bos_id] * 2
        counts.two_bos += bos[0] is not None and any(ids[:2] == bos for ids, _ in sides)
        prompts = [ids[: next(i for i, bits in enumerate(mask) if bits & ANSWER)] for ids, mask in sides]
        counts.other_prompts += prompts[0] != prompts[-1]
        marks = [REJECTED if sequence.is_rejected else 0 for sequence in example.sequences]
        masks = [bytes(bits | mark for bits in mask) for mark, (_, mask) in zip(marks, sides)]
        chunk.add([i for ids, _ in sides for i in ids], b"".join(masks), example.where)

    def too_long(self, example: RenderedExample, n_tokens: int) -> UserError:
        fix = "Raise --train.max_seq_length" if self.below_context else "Shorten the row"
        return UserError(
            f"{example.where} has {n_tokens} tokens. The limit is {self.max_length}. {fix}, or choose "
            "--data.too_long cut or drop."
        )

    def write(self, example: RenderedExample, tokens: list[Encoded], chunk: TokenChunk) -> None:
        """Make the loss mask, add a stop token if there is none, apply the length limit, and write the row."""
        counts = chunk.counts
        ids, mask = self.masked(example, tokens[0])
        if example.document:
            self.check_ids(example, ids)
            for start in range(0, len(ids), self.max_length):
                part = slice(start, start + self.max_length)
                if len(ids[part]) > 1:
                    chunk.measure(len(ids[part]))
                    chunk.add(ids[part], bytes(mask[part]), example.where)
            return
        n_tokens = len(ids)
        chunk.measure(n_tokens)
        if n_tokens > self.max_length:
            if self.data.too_long == "error":
                raise self.too_long(example, n_tokens)
            chunk.note("truncated", example.where, f"{n_tokens} tokens; the limit is {self.max_length}")
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
        chunk.add(ids, bytes(mask), example.where)

    def check_ids(self, example: RenderedExample, ids: list[int]) -> None:
        try:
            self.tokenizer.check(ids)
        except UserError as e:
            raise UserError(f"{example.where}: {e}") from e


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


def style_hash(style: PromptStyle) -> str:
    """A hash of the code of a style that is written in Python; empty for others."""
    if isinstance(style, ChatTemplate) or type(style).__module__ == PUBLIC:
        return ""
    functions = [getattr(getattr(type(style), n), "__code__", None) for n in ("apply", "prompt", "render_row")]
    code = [(f.co_code.hex(), repr(f.co_consts), f.co_names) for f in functions if f is not None]
    return hashlib.sha256(json.dumps([class_hash(type(style)), str(vars(style)), code]).encode()).hexdigest()


def class_hash(data_class: type) -> str:
    """A hash of the source files of a class, which may be the user's own, and of its base classes."""
    digest = hashlib.sha256()
    for base in data_class.__mro__:
        with contextlib.suppress(TypeError, OSError):  # built in, or defined in an interactive session
            digest.update(Path(inspect.getfile(base)).read_bytes())
    return digest.hexdigest()
