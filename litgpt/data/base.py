"""From rows to token ids: the one path for every data set."""

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

from litgpt.data.forms import FORMS, recognise, rename, to_row
from litgpt.data.lost import Lookup
from litgpt.data.row_files import read_rows, without_padding
from litgpt.data.tokens import (
    ANSWER,
    TRAINED,
    Counts,
    TokenizedRows,
    TokenWriter,
    cache_folder,
    kept_tokens,
    read_tokens,
)
from litgpt.errors import UserError, require
from litgpt.text.chat_template import clock_at
from litgpt.text.prompts import PromptStyle, choose_style, style_fields
from litgpt.text.tokenizer import Encoded, Tokenizer

AT_ONCE, CHARACTERS = 4000, 4_000_000  # rows that are tokenized together, and characters after which it is enough
CHAT_FORMS = ("messages", "sharegpt", "history", "preference", "label")
RawRows = Iterator[tuple[str, Any]]
TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Args:
        path: A file, or `hf:ORG/NAME` or `hf:ORG/NAME:SPLIT` for a data set of the Hugging Face hub.
        weight: How often its rows are seen in an epoch; a fraction takes that share of them.
        columns: Our key to the file's, where they differ.
        form: The form of the rows; by default it is recognised.
        inherits: Whether columns and form are those of another file, and hold only if the first row has such columns.
    """

    path: Union[Path, str]
    weight: float = 1.0
    columns: Optional[Mapping[str, str]] = None
    form: Optional[str] = None
    inherits: bool = False

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Where each row stands, and its value. Raises `UserError` for what spoils the whole file."""
        if not str(self.path).startswith("hf:"):
            yield from read_rows(Path(self.path))
            return
        rows = hub_data_set(str(self.path))
        yield from ((f"{self.path}, row {i + 1}", without_padding(fields)) for i, fields in enumerate(rows))

    def fitted(self, rows: RawRows) -> tuple["RowSource", RawRows]:
        """The source with a mapping that is its own, and its rows."""
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
        """Changes when the rows do."""
        if str(self.path).startswith("hf:"):
            return str(hub_data_set(str(self.path))._fingerprint)
        digest = hashlib.sha256()
        with open(self.path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
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
        raise UserError(f"The data set {name!r} cannot be loaded: {e}") from e


@dataclass(frozen=True)
class TextPiece:
    """A part of a plain document: `first` begins it, `last` ends it."""

    text: str
    first: bool
    last: bool


@dataclass
class TokenizedDataset:
    """What a run trains on and is judged by.

    Args:
        train: The rows to train on.
        val: The rows held back.
        style: What rendered them.
        turn_end: The text of the token that closes an answer.
        counts: What became of the rows that were read; those of separate validation files are in `val_counts`.
        mask_prompt: Whether only answers are trained.
        cached: Whether the tokens were there already.
        longer: Whether the model reads longer rows than were allowed.
        plain_text: Whether the rows are plain texts without a prompt style.
        files: How many rows of each file there are to train on, and of each separate validation file.

    Attributes:
        separate: Whether validation rows came from files of their own.
    """

    train: TokenizedRows
    val: TokenizedRows
    style: PromptStyle
    turn_end: Optional[str]
    counts: Counts
    val_counts: Optional[Counts]
    mask_prompt: bool
    cached: bool
    longer: bool
    plain_text: bool = False
    files: dict[str, int] = field(default_factory=dict)

    @property
    def separate(self) -> bool:
        return self.val_counts is not None


class DataModule(ABC):
    """Rows to train on and rows to judge by. A data set is a subclass that implements `sources`.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts. By default true for conversations and for
            whatever a chat template renders, false for instruction rows in a named style.
        val_split_fraction: The share of the rows that is held back for validation, at least 0 and below 1; 0.05 where
            no validation rows are given.
        prompt_style: auto for the checkpoint's chat template or, without one, alpaca for instruction rows and chatml
            for conversations; chat for the template; the name of a style; none; or a file with a Jinja template.
        train_on: Which words are trained: assistant for those of all answers, last for the last answer's, all for
            the prompts too; instead of mask_prompt.
        too_long: What becomes of a row longer than train.max_seq_length: cut it, drop it, or end with an error.
        on_bad_row: What happens to a row that cannot be used: stop with an error, or skip and count it.
        ignore_index: Accepted for older recipes; tokens that are not trained carry no number here.
        seed: Chooses the rows that are held back.
        num_workers: Accepted for older recipes; the tokens are made once, before the first step.
    """

    packed = False  # whether packs are the default for this data

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
        """Where the training rows come from, and the validation rows; None if those are to be held back."""

    def places(self) -> list[Path]:
        """The files and folders that the options name, as far as they are there."""
        values = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in vars(self).values())
        texts = (Path(v) for v in values if isinstance(v, (str, Path)) and v and "\0" not in str(v))
        return [path for path in texts if os.path.exists(path)]

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        """A raw row as one of the known forms; None to leave it out."""
        return fields

    @clock_at()  # the texts have the time that is in their key
    def load(
        self,
        tokenizer: Tokenizer,
        folder: Path,
        max_seq_length: int,
        say: Callable[[int], None] = lambda rows: None,
        context: Optional[int] = None,
    ) -> TokenizedDataset:
        """Token ids of the training and the validation rows, and how they were made.

        Args:
            tokenizer: The checkpoint's.
            folder: The checkpoint, whose chat template may be wanted.
            max_seq_length: The longest row that is allowed, in tokens.
            say: Told how many rows were tokenized so far; never, if the tokens are kept from an earlier run.
            context: The most tokens that the model reads, where that is known.

        Raises:
            UserError: the rows cannot be read or used.
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
        longer = context is None or max_seq_length < context
        maker = TokenMaker(self, tokenizer, style, turn_end, mask_prompt, max_seq_length, longer)
        train, counts, cached = maker.tokens(train_sources, say, opened)
        val_counts = None
        if val_sources is not None:
            if self.val_split_fraction:
                raise UserError("There are validation rows of their own: leave --data.val_split_fraction away.")
            val, val_counts, _ = maker.tokens(val_sources, say)
        else:
            train, val = self.split(train)
        files = kept_rows(train_sources, counts) | kept_rows(val_sources or [], val_counts)
        train = weighted(train, train_sources, counts, self.seed)
        return TokenizedDataset(
            train, val, style, turn_end, counts, val_counts, mask_prompt, cached, longer, plain_text, files
        )

    def first_form(self, sources: list[RowSource]) -> tuple[str, RawRows]:
        """The form of the first row that can be used, which decides the style where none was chosen; and the rows of
        the first source, opened."""
        for number, source in enumerate(sources):
            rows, seen = source.rows(), []
            for where, fields in rows:
                seen.append((where, fields))
                try:
                    adapted = self.fields(source, where, fields)
                    if adapted is not None:
                        form = source.form or recognise(adapted, where)
                        return form, itertools.chain(seen, rows) if number == 0 else sources[0].rows()
                except UserError as e:
                    if self.on_bad_row == "error":
                        raise with_remedy(e) from e
        raise UserError(f"No row of {', '.join(str(s.path) for s in sources)} can be used.")

    def fields(self, source: RowSource, where: str, fields: Any) -> Optional[dict[str, Any]]:
        """A raw row with our keys, or None to leave it out. Raises `UserError` if it could not even be read."""
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
        """Hold back a share of the rows, at random; equal rows stay on one side."""
        fraction = 0.05 if self.val_split_fraction is None else self.val_split_fraction
        wanted = max(1, round(fraction * len(rows))) if fraction else 0
        _, group = rows.row_hashes().unique(return_inverse=True)
        held = torch.zeros(len(rows), dtype=torch.bool)
        if group.numel() and int(group.max()) > 0:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
            sizes = group.bincount()
            taken = torch.zeros(len(sizes), dtype=torch.bool)
            count = 0
            for g in group[order].tolist():
                if count >= wanted:
                    break
                if not taken[g] and count + int(sizes[g]) < len(rows):
                    taken[g] = True
                    count += int(sizes[g])
            held = taken[group]
        return rows.subset((~held).nonzero().squeeze(1)), rows.subset(held.nonzero().squeeze(1))


@cache
def code_hash() -> str:
    """Changes when the code that makes tokens does, or a package that it uses."""
    litgpt = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted([*(litgpt / "data").glob("*.py"), *(litgpt / "text").iterdir()]):
        digest.update(file.read_bytes() if file.is_file() else b"")
    digest.update(" ".join(map(version, ("jinja2", "sentencepiece", "tokenizers"))).encode())
    return digest.hexdigest()


def class_hash(data_class: type) -> str:
    """Changes when the files that hold a class of data, and those above it, do: it may be the user's own."""
    digest = hashlib.sha256()
    for one in data_class.__mro__:
        with contextlib.suppress(TypeError, OSError):  # built in, or typed into an interpreter
            digest.update(Path(inspect.getfile(one)).read_bytes())
    return digest.hexdigest()


def with_remedy(error: UserError) -> UserError:
    """What is wrong with a row, with what helps unless that is said."""
    if "--data." in str(error):
        return error
    return UserError(f"{error} Mend the row; --data.on_bad_row skip leaves such rows out.")


@dataclass
class TokenMaker:
    """Renders and tokenizes rows, once, or finds that it was done before. `longer` as in `Loaded`."""

    data: DataModule
    tokenizer: Tokenizer
    style: PromptStyle
    turn_end: Optional[str]
    mask_prompt: bool
    max_length: int
    longer: bool

    def __post_init__(self) -> None:
        self.stops = self.tokenizer.stops(self.style)
        self.known_forms: dict[tuple, str] = {}
        self.lookup = Lookup(self.style)

    def tokens(
        self, sources: list[RowSource], say: Callable[[int], None], opened: Optional[RawRows] = None
    ) -> tuple[TokenizedRows, Counts, bool]:
        """The tokens of all rows of `sources`, what became of them, and whether the cache had them."""
        file = cache_folder() / f"{self.key(sources)}.safetensors"
        if found := kept_tokens(file):
            return *found, True
        writer, counts = TokenWriter(file), Counts()
        collecting = gc.isenabled()
        gc.disable()  # nothing here refers to itself, and looking for it took a tenth of the time
        try:
            for number, source in enumerate(sources):
                before = len(writer.hashes)
                source, rows = source.fitted(opened if opened is not None and number == 0 else source.rows())
                self.add(source, rows, writer, counts, say)
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
        """`make(*args)`; None, and counted, where that fails and bad rows are to be skipped."""
        try:
            return make(*args)
        except UserError as e:
            if self.data.on_bad_row == "error":
                raise with_remedy(e) from e
            counts.bad += 1
            return None

    def add(
        self, source: RowSource, rows: RawRows, writer: TokenWriter, counts: Counts, say: Callable[[int], None]
    ) -> None:
        """Write the rows of a source: while a batch of texts is tokenized, the next one is rendered."""
        with ThreadPoolExecutor(1) as pool:
            waiting: deque = deque()

            def write_oldest() -> None:
                texts, encoded = waiting.popleft()
                for text, tokens in zip(texts, encoded.result()):
                    self.attempt(counts, self.write, text, tokens, writer, counts)

            def tokenize(texts: list[RenderedExample]) -> None:
                special = [not text.own_special_tokens for text in texts]
                waiting.append((texts, pool.submit(self.tokenizer.encode_batch, [t.text for t in texts], special)))
                if len(waiting) > 1:
                    write_oldest()

            texts: list[RenderedExample] = []
            n_characters = 0
            for where, raw in rows:
                counts.rows += not isinstance(raw, TextPiece) or raw.first
                text = self.attempt(counts, self.render, source, where, raw, counts)
                if text is not None:
                    texts.append(text)
                    n_characters += len(text.text)
                    if len(texts) >= AT_ONCE or n_characters >= CHARACTERS:
                        tokenize(texts)
                        texts, n_characters = [], 0
                        say(len(writer.hashes))
            tokenize(texts)
            while waiting:
                write_oldest()

    def render(self, source: RowSource, where: str, raw: Any, counts: Counts) -> Optional["RenderedExample"]:
        """The text of a raw row; None, and counted, if its own label leaves it out."""
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
            counts.left_out += 1
            return None
        counts.forms[form] = counts.forms.get(form, 0) + 1
        if row.text is not None:
            return RenderedExample(where, row.text, [(0, len(row.text), True)], own_special_tokens=False, closed=False)
        try:
            text, answers = self.style.render_row(row.messages, row.tools, self.turn_end)
        except UserError as e:
            raise UserError(f"{where}: {e}. Mend the row, or choose another --data.prompt_style.") from e
        for kind in self.lookup.lost(row.messages, row.tools):
            counts.lost[kind] = counts.lost.get(kind, 0) + 1
            counts.lost_at.setdefault(kind, where)
        last = answers[-1][2]
        spans = []
        for start, end, i in answers:
            if row.messages[i].get("_context"):
                continue
            wanted = bool(row.messages[i].get("train", True)) and (self.data.train_on != "last" or i == last)
            spans.append((start, end, wanted))
        own = self.style.own_special_tokens
        closed = own and bool(self.turn_end) and text[: answers[-1][1]].endswith(str(self.turn_end))
        return RenderedExample(where, text, spans, own, closed)

    def form(self, fields: Any, where: str, counts: Counts) -> str:
        """The form of a row; where it has none, that of the rows before, which then can say what it lacks."""
        shape = tuple((key, value is None) for key, value in fields.items()) if isinstance(fields, dict) else None
        if shape is not None and shape in self.known_forms:
            return self.known_forms[shape]
        try:
            form = recognise(fields, where)
        except UserError:
            if not counts.forms:
                raise
            return max(counts.forms, key=lambda form: counts.forms[form])
        if shape is not None:
            self.known_forms[shape] = form
        return form

    def write(self, text: "RenderedExample", tokens: Encoded, writer: TokenWriter, counts: Counts) -> None:
        """Mark what is trained, see that the end is closed by a stop token, and write the row."""
        ids = tokens.ids
        marks = bytearray(b"\0" if self.mask_prompt else bytes([TRAINED])) * len(ids)
        for start, end, wanted in text.spans:
            first, behind = tokens.span(start, end)
            mark = ANSWER | (TRAINED if wanted else 0)
            marks[first:behind] = bytes([mark]) * (behind - first)
        eos = self.tokenizer.eos_id
        if not text.closed and eos is not None:
            if ids[-1:] != [eos]:  # some tokenizers add it by themselves
                ids = [*ids, eos]
                marks.append(0)
            marks[-1] = ANSWER | (TRAINED if text.spans[-1][2] else 0)
        if text.document:
            self.check(text, ids)
            for start in range(0, len(ids), self.max_length):
                part = slice(start, start + self.max_length)
                if len(ids[part]) > 1:
                    writer.add(ids[part], bytes(marks[part]))
            return
        if len(ids) > self.max_length:
            if self.data.too_long == "error":
                own = f"--train.max_seq_length {self.max_length}: raise it"
                of_model = f"the {self.max_length} that the model reads: shorten it"
                raise UserError(
                    f"{text.where} has {len(ids)} tokens, more than {own if self.longer else of_model}, or choose "
                    "--data.too_long cut or drop."
                )
            if self.data.too_long == "drop":
                counts.too_long += 1
                return
            counts.cut += 1
            ids, marks = ids[: self.max_length], marks[: self.max_length]
        self.check(text, ids)
        last = max(marks.rfind(TRAINED), marks.rfind(TRAINED | ANSWER))
        if last < 1:  # the first token follows nothing, so it is never a target
            counts.untrained += 1
            return
        if ids[last] not in self.stops:
            counts.no_stop += not any(i in self.stops and mark & TRAINED for i, mark in zip(ids, marks))
        counts.two_bos += self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2
        writer.add(ids, bytes(marks))

    def check(self, text: "RenderedExample", ids: list[int]) -> None:
        try:
            self.tokenizer.check(ids)
        except UserError as e:
            raise UserError(f"{text.where}: {e}") from e


@dataclass
class RenderedExample:
    """A rendered row: `spans` are its answers, each with whether it is trained; `closed`: no stop token is wanted at
    its end, where there is one already or the text goes on."""

    where: str
    text: str
    spans: list[tuple[int, int, bool]]
    own_special_tokens: bool
    closed: bool
    document: bool = False  # of any length: it becomes as many rows as it needs


def kept_rows(sources: list[RowSource], counts: Optional[Counts]) -> dict[str, int]:
    return dict(zip([str(source.path) for source in sources], counts.sources if counts else []))


def weighted(rows: TokenizedRows, sources: list[RowSource], counts: Counts, seed: int) -> TokenizedRows:
    """Rows of each source as often as its weight says; for the fraction of a weight a share of them, at random."""
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
