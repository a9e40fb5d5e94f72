"""From rows to token ids: one path for every data set."""

import contextlib
import gc
import hashlib
import inspect
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch

from litgpt.data.forms import FORMS, SKIP, recognize, rename, to_row
from litgpt.data.lost import Lookup
from litgpt.data.row_files import read_rows, without_padding
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
from litgpt.errors import UserError, require
from litgpt.text.chat_template import clock_at
from litgpt.text.prompts import PromptStyle, choose_style, style_fields
from litgpt.text.tokenizer import Encoded, Tokenizer

AT_ONCE, CHARACTERS = 4000, 4_000_000  # limits of a batch for the tokenizer: rows and characters
CHAT_FORMS = ("messages", "sharegpt", "history", "preference", "label")
RawRows = Iterator[tuple[str, Any]]
TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Args:
        path: A file, or `hf:ORG/NAME` or `hf:ORG/NAME:SPLIT` for a data set on the Hugging Face hub.
        weight: How often its rows are seen in an epoch. A fraction takes that share of the rows.
        columns: Maps litgpt's columns to those of the file.
        form: The form of the rows. If None, it is recognized.
        inherits: `columns` and `form` are those of another file, and apply only if the first row has such columns.
    """

    path: Union[Path, str]
    weight: float = 1.0
    columns: Optional[Mapping[str, str]] = None
    form: Optional[str] = None
    inherits: bool = False

    def rows(self) -> Iterator[tuple[str, Any]]:
        """The position and the value of each row. Raises `UserError` if the file cannot be read."""
        if not str(self.path).startswith("hf:"):
            yield from read_rows(Path(self.path))
            return
        rows = hub_data_set(str(self.path))
        yield from ((f"{self.path}, row {i + 1}", without_padding(fields)) for i, fields in enumerate(rows))

    def fitted(self, rows: RawRows) -> tuple["RowSource", RawRows]:
        """The source with only those inherited options that fit its first row, and the rows."""
        if not self.inherits:
            return self, rows
        seen: list[tuple[str, Any]] = []
        for where, fields in rows:
            seen.append((where, fields))
            if isinstance(fields, dict):
                columns = self.columns if set((self.columns or {}).values()) <= fields.keys() else None
                known = rename(fields, columns, where) if columns else fields
                form = self.form if self.form in FORMS and not FORMS[self.form].lacking(known) else None
                return replace(self, columns=columns, form=form), itertools.chain(seen, rows)
        return self, iter(seen)

    def fingerprint(self) -> str:
        """A hash of the rows."""
        if str(self.path).startswith("hf:"):
            return str(hub_data_set(str(self.path))._fingerprint)
        digest = hashlib.sha256()
        with open(self.path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


@lru_cache
def hub_data_set(path: str) -> Any:
    """The rows of `hf:ORG/NAME` or `hf:ORG/NAME:SPLIT`, memory-mapped by the `datasets` package."""
    name, _, split = path.removeprefix("hf:").partition(":")
    try:
        return require("datasets", "data").load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"Cannot load the data set {name!r}: {e}") from e


@dataclass(frozen=True)
class TextPiece:
    """A piece of a document. `first` and `last` mark its ends."""

    text: str
    first: bool
    last: bool


@dataclass
class TokenizedDataset:
    """The rows that a run trains and validates on.

    Args:
        train: Training rows.
        val: Validation rows.
        style: The prompt style of the rows.
        turn_end: The text of the token that ends an answer.
        counts: What happened to the rows that were read; `val_counts` for separate validation files.
        mask_prompt: Whether only answers are trained on.
        cached: Whether the tokens came from the cache.
        below_context: Whether the model could read longer rows than the limit.
        plain_text: Whether the rows are texts without a prompt style.
        files: The number of usable rows in each training file and each separate validation file.
    """

    train: TokenizedRows
    val: TokenizedRows
    style: PromptStyle
    turn_end: Optional[str]
    counts: Counts
    val_counts: Optional[Counts]
    mask_prompt: bool
    cached: bool
    below_context: bool
    plain_text: bool = False
    files: dict[str, int] = field(default_factory=dict)


class DataModule(ABC):
    """Training and validation rows. A data set is a subclass that implements `sources`.

    Args:
        mask_prompt: Train on the answers only, not on the prompts. If null: true for conversations and for rows
            rendered by a chat template, false for instruction rows in a named style.
        val_split_fraction: Fraction of the rows that is held out for validation, at least 0 and below 1. If null: 0.05
            unless there are validation rows.
        prompt_style: auto for the checkpoint's chat template or, without one, alpaca for instruction rows and chatml
            for conversations; chat for the template; the name of a style; none; or a file with a Jinja template.
        train_on: What to train on: assistant for all answers, last for the last answer of each row, or all for
            prompts too. Replaces mask_prompt.
        too_long: What to do with rows longer than train.max_seq_length: cut (truncate), drop, or stop with an error.
        on_bad_row: What to do with rows that cannot be used: stop with an error, or skip and count them.
        ignore_index: No effect. Accepted for older recipes.
        seed: Seed for the choice of held-out rows.
        num_workers: No effect. Accepted for older recipes.
    """

    packed = False  # whether packing is on by default

    def __init__(
        self,
        mask_prompt: Optional[bool] = None,
        val_split_fraction: Optional[float] = None,
        prompt_style: str = "auto",
        train_on: Optional[TrainOn] = None,
        too_long: Literal["cut", "drop", "error"] = "cut",
        on_bad_row: Literal["error", "skip"] = "error",
        ignore_index: int = -100,
        seed: int = 42,
        num_workers: int = 4,
    ) -> None:
        if val_split_fraction is not None and not 0 <= val_split_fraction < 1:
            raise UserError(f"--data.val_split_fraction {val_split_fraction} must be at least 0 and below 1.")
        self.mask_prompt, self.train_on = mask_prompt, train_on
        self.val_split_fraction, self.seed = val_split_fraction, seed
        self.prompt_style = prompt_style
        self.too_long, self.on_bad_row = too_long, on_bad_row

    @abstractmethod
    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        """The sources of the training rows and of the validation rows, or None to hold out training rows."""

    def places(self) -> list[Path]:
        """The existing files and folders that the options name."""
        values = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in vars(self).values())
        texts = (Path(v) for v in values if isinstance(v, (str, Path)) and v and "\0" not in str(v))
        return [path for path in texts if os.path.exists(path)]

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        """A raw row in one of the known forms, or None to skip it."""
        return fields

    @clock_at()  # templates print the time that is part of the cache key
    def load(
        self,
        tokenizer: Tokenizer,
        folder: Path,
        max_seq_length: int,
        on_progress: Callable[[int], None] = lambda rows: None,
        context: Optional[int] = None,
    ) -> TokenizedDataset:
        """Tokenize the training and validation rows, or load their tokens from the cache.

        Args:
            tokenizer: The checkpoint's tokenizer.
            folder: The checkpoint, for its chat template.
            max_seq_length: Maximum length of a row, in tokens.
            on_progress: Called with the number of tokenized rows; never called if they come from the cache.
            context: The model's context length in tokens, if known.

        Raises:
            UserError: The rows cannot be read or used.
        """
        train_sources, val_sources = self.sources()
        form, opened = self.first_form(train_sources)
        plain_text = form == "text" and self.prompt_style == "auto"
        name = "none" if plain_text else self.prompt_style
        style = choose_style(name, folder, chat=form in CHAT_FORMS)
        turn_end = style.turn_end(tokenizer.special_tokens) or tokenizer.eos_token
        mask_prompt = self.mask_prompt
        if self.train_on is not None:
            mask_prompt = self.train_on != "all"
        elif mask_prompt is None:
            mask_prompt = style.own_special_tokens or form in CHAT_FORMS
        below_context = context is None or max_seq_length < context
        maker = TokenMaker(self, tokenizer, style, turn_end, mask_prompt, max_seq_length, below_context)
        train, counts, cached = maker.tokens(train_sources, on_progress, opened)
        files = {str(source.path): n for source, n in zip(train_sources, counts.sources)}
        val_counts = None
        if val_sources is None:
            train, val = self.split(train)
        elif self.val_split_fraction:
            raise UserError("Remove --data.val_split_fraction: the data has separate validation rows.")
        else:
            val, val_counts, _ = maker.tokens(val_sources, on_progress)
            files |= {str(source.path): n for source, n in zip(val_sources, val_counts.sources)}
        return TokenizedDataset(
            train=weighted(train, train_sources, counts, self.seed),
            val=val,
            style=style,
            turn_end=turn_end,
            counts=counts,
            val_counts=val_counts,
            mask_prompt=mask_prompt,
            cached=cached,
            below_context=below_context,
            plain_text=plain_text,
            files=files,
        )

    def first_form(self, sources: list[RowSource]) -> tuple[str, RawRows]:
        """The form of the first usable row, which decides the default style, and the rows of the first source."""
        for number, source in enumerate(sources):
            rows, seen = source.rows(), []
            for where, fields in rows:
                seen.append((where, fields))
                try:
                    adapted = self.fields(source, where, fields)
                    if adapted is not None:
                        form = source.form or recognize(adapted, where)
                        return form, itertools.chain(seen, rows) if number == 0 else sources[0].rows()
                except UserError as e:
                    if self.on_bad_row == "error":
                        raise with_remedy(e) from e
        raise UserError(f"No usable rows in {', '.join(str(s.path) for s in sources)}.")

    def fields(self, source: RowSource, where: str, fields: Any) -> Optional[dict[str, Any]]:
        """A raw row with litgpt's keys, or None to skip it. Raises `UserError` for a row that could not be parsed."""
        if isinstance(fields, UserError):
            raise fields
        if isinstance(fields, TextPiece):
            return {"text": fields}
        if fields is None:
            raise UserError(f"{where}, is null, not an object.")
        if isinstance(fields, dict):
            fields = self.adapt(rename(fields, source.columns, where) if source.columns else fields)
        return fields

    def split(self, rows: TokenizedRows) -> tuple[TokenizedRows, TokenizedRows]:
        """Hold out a random fraction of the rows. Equal rows stay on one side."""
        fraction = 0.05 if self.val_split_fraction is None else self.val_split_fraction
        n_val = max(1, round(fraction * len(rows))) if fraction else 0
        _, group = rows.row_hashes().unique(return_inverse=True)
        held = torch.zeros(len(rows), dtype=torch.bool)
        if group.numel() and int(group.max()) > 0:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
            sizes = group.bincount()
            taken = torch.zeros(len(sizes), dtype=torch.bool)
            count = 0
            for g in group[order].tolist():
                if count >= n_val:
                    break
                if not taken[g] and count + int(sizes[g]) < len(rows):
                    taken[g] = True
                    count += int(sizes[g])
            held = taken[group]
        return rows.subset((~held).nonzero().squeeze(1)), rows.subset(held.nonzero().squeeze(1))


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


@dataclass
class TokenMaker:
    """Renders and tokenizes rows, or takes their tokens from the cache. See `TokenizedDataset` for the fields."""

    data: DataModule
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
        self, sources: list[RowSource], on_progress: Callable[[int], None], opened: Optional[RawRows] = None
    ) -> tuple[TokenizedRows, Counts, bool]:
        """The tokens of all rows of `sources`, their counts, and whether they came from the cache."""
        file = cache_folder() / f"{self.key(sources)}.safetensors"
        if found := cached_tokens(file):
            return *found, True
        writer, counts = TokenWriter(file), Counts()
        collecting = gc.isenabled()
        gc.disable()  # there are no cycles to collect; searching for them takes a tenth of the time
        try:
            for number, source in enumerate(sources):
                before = len(writer.hashes)
                source, rows = source.fitted(opened if opened is not None and number == 0 else source.rows())
                self.add(source, rows, writer, counts, on_progress)
                counts.sources.append(len(writer.hashes) - before)
            writer.close(counts)
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

    def add(
        self, source: RowSource, rows: RawRows, writer: TokenWriter, counts: Counts, on_progress: Callable[[int], None]
    ) -> None:
        """Write the rows of a source. The next batch is rendered while one is tokenized."""
        with ThreadPoolExecutor(1) as pool:
            pending: deque = deque()

            def write_oldest() -> None:
                examples, encoded = pending.popleft()
                for example, tokens in zip(examples, encoded.result()):
                    self.attempt(counts, self.write, example, tokens, writer, counts)

            def tokenize(examples: list[RenderedExample]) -> None:
                texts, special = [e.text for e in examples], [not e.own_special_tokens for e in examples]
                pending.append((examples, pool.submit(self.tokenizer.encode_batch, texts, special)))
                if len(pending) > 1:
                    write_oldest()

            examples: list[RenderedExample] = []
            n_characters = 0
            for where, raw in rows:
                counts.rows += not isinstance(raw, TextPiece) or raw.first
                example = self.attempt(counts, self.render, source, where, raw, counts)
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

    def render(self, source: RowSource, where: str, raw: Any, counts: Counts) -> Optional["RenderedExample"]:
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

    def write(self, example: "RenderedExample", tokens: Encoded, writer: TokenWriter, counts: Counts) -> None:
        """Make the loss mask, add a stop token if there is none, apply the length limit, and write the row."""
        ids = tokens.ids
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

    def check_ids(self, example: "RenderedExample", ids: list[int]) -> None:
        try:
            self.tokenizer.check(ids)
        except UserError as e:
            raise UserError(f"{example.where}: {e}") from e


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


def weighted(rows: TokenizedRows, sources: list[RowSource], counts: Counts, seed: int) -> TokenizedRows:
    """The rows of each source, repeated by its weight. A fraction of a weight takes a random share of the rows."""
    if all(s.weight == 1 for s in sources):
        return rows
    ends = torch.tensor(counts.sources).cumsum(0)
    of = torch.bucketize(rows.index, ends, right=True)
    chosen = []
    for number, source in enumerate(sources):
        own = (of == number).nonzero().squeeze(1)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        chosen += [own] * int(source.weight)
        chosen.append(own[order[: round(source.weight % 1 * len(own))].sort().values])
    return rows.subset(torch.cat(chosen))
