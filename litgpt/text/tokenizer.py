"""Text to token ids and back, as the checkpoint's own tokenizer does it."""

import base64
import codecs
import hashlib
import itertools
import json
import math
import re
import shutil
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

from litgpt.errors import BUGS, UserError
from litgpt.storage.fields import ADDED_FLAGS
from litgpt.storage.files import TOKENIZER_BYTES, check_size, is_there, read_json
from litgpt.text.prompts import MORE_TEMPLATES, SPECIAL_TOKENS, TEMPLATE, PromptStyle

GROWTH = 1000  # that a normalizer or a decoder may lengthen a text
GENERATION = "generation_config.json"
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE,
    GENERATION,
)  # what belongs to the tokenizer of a folder, and is copied with it


class TooLong(UserError):
    """A text has more tokens than the model reads."""


class Encoded(Protocol):
    """The tokens of a text."""

    ids: list[int]

    def surround(self, before: list[int], after: list[int]) -> None:
        """Put ids around those of the text."""
        ...

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The first token that holds some of the characters from `start` to `end`, and the one behind the last."""
        ...


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: Has `tokenizer.json`, `tokenizer.model`, or `vocab.json` and `merges.txt`.
        model_folder: Has the `config.json` that may name BOS and EOS; by default the same.
        n_embeddings: How many tokens the model has an embedding for, from id 0 on; None for any number. Many published
            tokenizers have more tokens, which no text may use.

    Raises:
        UserError: it has none of them, or what it has cannot be read.
    """

    def __init__(self, folder: Path, model_folder: Optional[Path] = None, n_embeddings: Optional[int] = None) -> None:
        self.folder, self.n_embeddings = folder, n_embeddings
        model_folder = model_folder or folder
        model = optional_json(model_folder / "config.json")
        fields = token_fields(folder)
        kind = tokenizer_class(fields, model.get("model_type"))
        self.backend: _Tokenizers | _SentencePiece
        if is_there(folder / "tokenizer.json"):
            check_size(folder / "tokenizer.json", TOKENIZER_BYTES)
            with as_user_error(folder / "tokenizer.json"):
                self.backend = _Tokenizers(read_backend(folder / "tokenizer.json", fields, kind), fields)
        elif is_there(folder / "tokenizer.model"):
            check_size(folder / "tokenizer.model", TOKENIZER_BYTES)
            with as_user_error(folder / "tokenizer.model"):
                self.backend = _SentencePiece(folder / "tokenizer.model", fields)
        elif is_there(folder / "vocab.json") and is_there(folder / "merges.txt"):
            for name in ("vocab.json", "merges.txt"):
                check_size(folder / name, TOKENIZER_BYTES)
            with as_user_error(f"{folder / 'vocab.json'} with merges.txt"):
                self.backend = _Tokenizers(make_backend(folder, fields, kind), fields)
        else:
            raise UserError(f"{folder} has no tokenizer.json, no tokenizer.model, and no vocab.json with merges.txt.")
        names = CLASS_TOKENS.get(kind, self.backend.ends)
        self.bos_token = token_text(fields["bos_token"]) if "bos_token" in fields else names[0]
        self.eos_token = token_text(fields["eos_token"]) if "eos_token" in fields else names[1]
        self.bos_id = self.token_id(self.bos_token, model.get("bos_token_id"))
        self.eos_id = self.token_id(self.eos_token, model.get("eos_token_id"))
        self.kind = kind
        stops = [self.eos_id, *as_list(model.get("eos_token_id"))]
        for place in {folder, model_folder}:
            stops += as_list(optional_json(place / GENERATION).get("eos_token_id"))
        self.stop_ids = frozenset(i for i in stops if i is not None and i >= 0)

    def token_id(self, token: Optional[str], otherwise: Any) -> Optional[int]:
        found = self.backend.token_id(token) if token else None
        return found if found is not None else next((i for i in as_list(otherwise) if i is not None and i >= 0), None)

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size

    @property
    def special_tokens(self) -> list[str]:
        """The texts that are tokens by themselves wherever they stand, such as `</s>`."""
        return self.backend.special_tokens

    def stops(self, style: PromptStyle) -> frozenset[int]:
        """The tokens that end an answer: those that the model folder names, and the one that the style writes."""
        end = style.turn_end(self.special_tokens)
        found = self.backend.token_id(end) if end else None
        return self.stop_ids if found is None else self.stop_ids | {found}

    def trained_stop(self, style: PromptStyle) -> Optional[int]:
        """The token that ends an answer in training: the one that the style writes, else EOS."""
        end = style.turn_end(self.special_tokens)
        return self.backend.token_id(end) if end else self.eos_id

    @property
    def prefix(self) -> str:
        """What the tokenizer puts before a text by itself, such as BOS."""
        return self.decode(self.backend.before, skip_special=False)

    def fingerprint(self) -> str:
        """Changes when the tokenizer does."""
        digest = hashlib.sha256(self.kind.encode())
        for name in FILES:
            if (self.folder / name).is_file():
                digest.update(name.encode())
                with open(self.folder / name, "rb") as f:
                    while block := f.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()

    def encode(self, text: str, special: bool = True, eos: bool = False, limit: Optional[int] = None) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Special tokens written in it become those tokens.
            special: Whether the tokenizer adds what it adds by itself, such as BOS; never a second BOS.
            eos: Whether EOS follows; never a second one.
            limit: Refuse a text of this many tokens or more, without tokenizing it where its length alone shows that.

        Raises:
            TooLong: the text reaches the limit.
            UserError: the text has half a surrogate pair, a byte that is not UTF-8, or a token that the model has no
                embedding for.
        """
        with as_user_error(self.folder, [text]):
            if limit is not None and len(text) >= limit and (least := self.backend.least(text)) >= limit:
                raise TooLong(f"The prompt has at least {least} tokens; the model reads at most {limit}.")
            encoded = self.backend.encode(text)
        if limit is not None and len(encoded) >= limit:  # before a large list of Python's numbers is made
            raise TooLong(f"The prompt has {len(encoded)} tokens; the model reads at most {limit}.")
        ids: list[int] = encoded if isinstance(encoded, list) else encoded.ids
        if special:
            before = self.backend.before
            ids = [*(before if ids[: len(before)] != before else []), *ids, *self.backend.after]
        ids = [*ids, self.eos_id] if eos and self.eos_id is not None and ids[-1:] != [self.eos_id] else ids
        self.check(ids)
        return ids

    def check(self, ids: Sequence[int]) -> None:
        """Raise `UserError` if the model has no embedding for one of these tokens."""
        if self.n_embeddings is not None and max(ids, default=0) >= self.n_embeddings:
            wrong = next(i for i in ids if i >= self.n_embeddings)
            raise UserError(
                f"The text has the token {self.decode([wrong], skip_special=False)!r} (id {wrong}), but the model has "
                f"only {self.n_embeddings} embeddings. Remove the token from the text or the chat template, or use a "
                "model whose embedding was resized for this tokenizer."
            )

    def encode_batch(self, texts: Sequence[str], special: Sequence[bool]) -> list[Encoded]:
        """Ids and character offsets of many texts, on all cores; `special` as in `encode`, for each text. Call `check`
        before the model gets the ids: one text may be wrong and the others right."""
        with as_user_error(self.folder, texts):
            found = self.backend.encode_batch(texts)
        before, after = self.backend.before, self.backend.after
        for encoded, wanted in zip(found, special):
            if wanted:
                encoded.surround(before if encoded.ids[: len(before)] != before else [], after)
        return found

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        with as_user_error(self.folder):
            return self.backend.decode(list(ids), skip_special)


@contextmanager
def as_user_error(what: Any, texts: Sequence[str] = ()) -> Iterator[None]:
    """Turn whatever a library raises for a tokenizer that it cannot use, which may be a panic, or for one of the texts,
    into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as e:
        if wrong := not_text(texts):
            raise wrong from e
        if isinstance(e, BUGS):
            raise
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"The tokenizer in {what} cannot be used: {e}.") from e


def not_text(texts: Sequence[str]) -> Optional[UserError]:
    """What is wrong with the first of the texts that cannot be written as UTF-8; None if all can."""
    bad = next((text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)), None)
    if bad is None:
        return None
    byte = next(ord(c) for c in bad if "\ud800" <= c <= "\udfff") - 0xDC00
    if 0x80 <= byte <= 0xFF:  # how Python reads a byte of a shell or a pipe that is no UTF-8
        return UserError(f"The text {bad[:40]!r} is not UTF-8 (byte {byte:#x}).")
    return UserError(f"{bad[:40]!r} has half a surrogate pair, which is no text.")


EACH_BYTE = "litgpt.each_byte"
codecs.register_error(EACH_BYTE, lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]


BYTES = {f"<0x{i:02X}>": i for i in range(256)}.keys()  # the tokens of a model that writes unknown characters as bytes


class Shrinking(NamedTuple):
    """What steps of a tokenizer do to the length of a text.

    Args:
        factor: So many characters become one, at most.
        drops_blanks: Blanks may vanish altogether.
    """

    factor: float = 1.0
    drops_blanks: bool = False


SHRINKING = {  # what is not here may drop anything
    **dict.fromkeys(("NFC", "NFKC"), Shrinking(4)),  # U+1F82 is composed of four characters, none of more
    **dict.fromkeys(("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel", "Metaspace", "Digits"), Shrinking()),
    **dict.fromkeys(("UnicodeScripts", "FixedLength", "Split", "Punctuation"), Shrinking()),
    **dict.fromkeys(("Strip", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"), Shrinking(1, True)),
}


def lost_bytes(vocabulary: Mapping[str, int]) -> Optional[str]:
    """The control characters that vanish since a byte-level model has no token for them. None where others may, too."""
    from tokenizers import pre_tokenizers

    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lost = "".join(c for c in map(chr, range(128)) if letters.pre_tokenize_str(c)[0][0] not in vocabulary)
    # each character beyond ASCII has one of these bytes
    later = {letters.pre_tokenize_str(chr(i))[0][0][-1] for i in range(0x80, 0xC0)}
    return lost if vocabulary.keys() >= later and all(unicodedata.category(c) == "Cc" for c in lost) else None


def shrinking(step: dict[str, Any]) -> Optional[Shrinking]:
    """What a normalizer or a pre-tokenizer, as a `tokenizer.json` has it, does to the length of a text. None where it
    may drop any part of it."""
    if step["type"] == "Sequence":
        found = Shrinking()
        for inner in step.get("normalizers") or step.get("pretokenizers") or []:
            if (part := shrinking(inner)) is None:
                return None
            found = Shrinking(found.factor * part.factor, found.drops_blanks or part.drops_blanks)
        return found
    if step["type"] == "Replace":
        old, new = step["pattern"].get("String"), step["content"]
        return Shrinking(max(1.0, len(old) / len(new))) if old and new else None
    return None if step.get("behavior") == "Removed" else SHRINKING.get(step["type"])


class _FastEncoded:
    """What `tokenizers` returns; the places of its tokens are asked for one by one, which is quicker than all."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding
        self.ids: list[int] = encoding.ids
        self.shift = 0  # ids that were put before

    def surround(self, before: list[int], after: list[int]) -> None:
        self.ids = [*before, *self.ids, *after]
        self.shift = len(before)

    def span(self, start: int, end: int) -> tuple[int, int]:
        find, places = self.encoding.char_to_token, self.encoding.token_to_chars
        first = next((t for c in range(start, end) if (t := find(c)) is not None), None)
        if first is None:
            return 0, 0
        last = next(t for c in range(end - 1, start - 1, -1) if (t := find(c)) is not None)
        while (place := places(last + 1)) is not None and place[0] < end:
            last += 1  # one character, several tokens
        return first + self.shift, last + 1 + self.shift


@dataclass
class _PieceEncoded:
    """What sentencepiece returns; the first bytes of a character that is written as bytes stand for (i, i), what was
    put before for (0, 0)."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def surround(self, before: list[int], after: list[int]) -> None:
        end = self.offsets[-1][1] if self.offsets else 0
        self.ids = [*before, *self.ids, *after]
        self.offsets = [*[(0, 0)] * len(before), *self.offsets, *[(end, end)] * len(after)]

    def span(self, start: int, end: int) -> tuple[int, int]:
        if start >= end:
            return 0, 0
        first = bisect_left(self.offsets, start + 1, key=lambda o: o[1])
        while first > 1 and self.offsets[first - 1] == (start, start):
            first -= 1
        return first, bisect_left(self.offsets, end, lo=first, key=lambda o: o[0])


class _Tokenizers:
    """A tokenizer of the library `tokenizers`.

    Attributes:
        before, after: The ids that its post-processor puts around a text.
        ends: BOS and EOS, where the model of the tokenizer itself names them.
    """

    ends: tuple[Optional[str], ...] = (None, None)

    def __init__(self, backend: Any, fields: dict[str, Any]) -> None:
        self.backend = backend
        add_tokens(backend, fields)
        known = next((text for text in "a1. " if backend.encode(text, add_special_tokens=False).ids), "")
        plain, whole = (backend.encode(known, add_special_tokens=special).ids for special in (False, True))
        n = next((i for i in range(len(whole), -1, -1) if whole[i : i + len(plain)] == plain), None)
        if n is None:
            raise ValueError("its post_processor loses the text")
        self.before, self.after = whole[:n], whole[n + len(plain) :]
        self.vocab_size = backend.get_vocab_size()
        self.bytes: dict[int, int] = {}  # tokens that stand for a byte
        if "ByteFallback" in str(backend.decoder):
            found = {backend.token_to_id(token): i for i, token in enumerate(BYTES)}
            self.bytes = found if None not in found else {}

    @property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    def token_id(self, token: str) -> Optional[int]:
        return self.backend.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [_FastEncoded(e) for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def encode(self, text: str) -> Any:
        """A text alone: something with a length and `ids`. Without offsets, which take half of the time."""
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0]

    @cached_property
    def bound(self) -> Optional[tuple[float, str]]:
        """Characters of a text that one token stands for, at most, and a regular expression of those that may vanish
        without a token. None where there is no such number."""
        steps = [s for s in (self.backend.normalizer, self.backend.pre_tokenizer) if s is not None]
        found = shrinking({"type": "Sequence", "normalizers": [json.loads(step.__getstate__()) for step in steps]})
        vocabulary = self.backend.get_vocab()  # with the added tokens
        if getattr(self.backend.model, "byte_fallback", False) and vocabulary.keys() >= BYTES:
            lost: Optional[str] = ""
        else:
            lost = lost_bytes(vocabulary) if "ByteLevel" in "".join(map(str, steps)) else None
        if found is None or lost is None:
            return None
        strips = any(t.lstrip or t.rstrip for t in self.backend.get_added_tokens_decoder().values())
        dropped = re.escape(lost) + (r"\s" if found.drops_blanks or strips else "")
        return found.factor * max(map(len, vocabulary)), f"[{dropped}]+" if dropped else ""

    def least(self, text: str) -> int:
        if self.bound is None:
            return 0
        per_token, dropped = self.bound
        return math.ceil(len(re.sub(dropped, "", text) if dropped else text) / per_token)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        if self.bytes:
            ids = self.mended([i for i in ids if i not in self.hidden] if skip_special else ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    @cached_property
    def hidden(self) -> set[int]:
        """The special tokens, which are no part of a text; bytes on both sides of one may be a character."""
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def mended(self, ids: list[int]) -> list[int]:
        """The ids with a replacement character for each byte that is part of none. The library gives up a whole run of
        bytes for one of them: an answer that ends within a character would lose those before it."""
        if self.bytes.keys().isdisjoint(ids):
            return ids
        tokens = {byte: i for i, byte in self.bytes.items()}
        mended: list[int] = []
        for is_bytes, run in itertools.groupby(ids, key=self.bytes.__contains__):
            part = list(run)
            if is_bytes:
                part = [tokens[b] for b in bytes(self.bytes[i] for i in part).decode(errors=EACH_BYTE).encode()]
            mended += part
        return mended


def read_backend(file: Path, fields: dict[str, Any], kind: str) -> Any:
    """A `tokenizer.json`, as `transformers` reads it.

    A `LlamaTokenizer` puts its blank before a text and not before each part between special tokens, whatever the file
    says, and a `GPTNeoXTokenizer` adds nothing. Otherwise the file alone says what is done and what is added.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers, processors

    data = file.read_bytes()
    check_maps(data)
    backend = Backend.from_buffer(data)
    if kind == "LlamaTokenizer" and getattr(backend.model, "byte_fallback", False):  # made from sentencepiece
        prefix = fields.get("add_prefix_space") is not False
        scheme = ("always" if fields.get("legacy") else "first") if prefix else "never"
        backend.normalizer = None  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        strip = [decoders.Strip(content=" ", left=1)] if prefix else []
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    if kind == "GPTNeoXTokenizer":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    backend.no_truncation()  # a file may have kept them from a training run
    backend.no_padding()
    for part in (backend.normalizer, backend.decoder, backend.post_processor):
        check_growth(part)
    return backend


def check_maps(data: bytes) -> None:
    """Raise `ValueError` for a table of characters that claims to be larger than it is. The library would take that
    much memory, or end the process."""
    for found in re.finditer(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"', data):
        table = base64.b64decode(found[1])
        if int.from_bytes(table[:4], "little") > len(table):
            raise ValueError("its precompiled_charsmap is damaged")


def check_growth(part: Any) -> None:
    """Raise `ValueError` where a part of a tokenizer would make a text very much longer; the library would end the
    process for lack of memory."""
    growth, added = 1.0, 0
    for step in steps_in(json.loads(part.__getstate__())) if part is not None else ():
        if step.get("type") == "Replace":
            old = step["pattern"].get("String", "")
            growth *= max(1.0, len(step["content"]) / max(1, len(old)) + (not old))
        added += len(step.get("prepend") or "") + len(step.get("single") or ())
    if growth > GROWTH or added > GROWTH:
        raise ValueError(f"it makes a text more than {GROWTH:,} times as long")


def steps_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a value, with those below it."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from steps_in(inner)
    if isinstance(value, dict):
        yield value


QWEN_WORDS = (  # what its published tokenizer.json splits by
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_backend(folder: Path, fields: dict[str, Any], kind: str) -> Any:
    """The byte-level BPE of a `vocab.json` and a `merges.txt`, with what the class of the tokenizer does before it."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    blank = bool(fields.get("add_prefix_space"))
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    if kind == "Qwen2Tokenizer":
        split = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=blank, use_regex=False)])
    if kind in ("GPTNeoXTokenizer", "Qwen2Tokenizer"):
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    names = CLASS_TOKENS.get(kind, (None, None))
    bos = token_text(fields.get("bos_token", names[0])) if fields.get("add_bos_token") else None
    eos = token_text(fields.get("eos_token", names[1])) if fields.get("add_eos_token") else None
    add_tokens(backend, fields)
    around = {t: i for t in (bos, eos) if t and (i := backend.token_to_id(t)) is not None}
    template = " ".join([*([bos] if bos in around else []), "$A", *([eos] if eos in around else [])])  # type: ignore
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(around.items()))  # type: ignore
    return backend


def add_tokens(backend: Any, fields: dict[str, Any]) -> None:
    """Give a tokenizer the special tokens that only the files beside it name; those that it has stay as they are."""
    from tokenizers import AddedToken

    for _, token in sorted(fields["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
        flags = {name: token[name] for name in ADDED_FLAGS if token.get(name) is not None}
        backend.add_tokens([AddedToken(token["content"], **flags)])
    backend.add_special_tokens(named_tokens(fields))


class _SentencePiece:
    """A `tokenizer.model`, with the special tokens that the files beside it add.

    Attributes:
        before, after: The ids that are put around a text.
        ends: BOS and EOS, as the model names them.
    """

    START = "\x01"  # stands before a part within a text, which does not get the blank that a text begins with

    def __init__(self, file: Path, fields: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.backend = SentencePieceProcessor(model_file=str(file))
        n, named = self.backend.vocab_size(), named_tokens(fields)
        controls = {self.backend.id_to_piece(i): i for i in range(n) if self.backend.is_control(i)}
        listed = {t["content"]: int(i) for i, t in fields["added_tokens_decoder"].items()}
        beyond = {token: i for token, i in listed.items() if i >= n}
        self.added = controls | beyond  # what is a token by itself, by its text
        self.texts = {i: token for token, i in self.added.items()}
        flags = {t["content"]: t.get("special", False) for t in fields["added_tokens_decoder"].values()}
        self.hidden = {i for token, i in self.added.items() if token in controls or token in named or flags[token]}
        self.vocab_size = max([n, *(i + 1 for i in beyond.values())])
        longest_first = sorted(self.added, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        bos, eos = self.backend.bos_id(), self.backend.eos_id()
        self.before = [bos] if fields.get("add_bos_token", True) and bos >= 0 else []
        self.after = [eos] if fields.get("add_eos_token") and eos >= 0 else []
        self.ends = tuple(self.backend.id_to_piece(i) if i >= 0 else None for i in (bos, eos))
        self.n_start = len(self.backend.encode(self.START))

    @property
    def special_tokens(self) -> list[str]:
        return list(self.added)

    def token_id(self, token: str) -> Optional[int]:
        found = self.added.get(token, self.backend.piece_to_id(token))
        return found if found in self.texts or self.backend.id_to_piece(found) == token else None

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [self.encode_one(text) for text in texts]

    def encode_one(self, text: str) -> Encoded:
        encoded = _PieceEncoded([], [])
        for start, end, token in self.parts(text):
            if token is not None:
                encoded.ids.append(token)
                encoded.offsets.append((start, end))
                continue
            before, n = (self.START, self.n_start) if start else ("", 0)
            found = self.backend.encode(before + text[start:end], out_type="offset_mapping")
            shift = start - len(before)
            encoded.ids += found["ids"][n:]
            encoded.offsets += [(shift + a, shift + b) for a, b in found["offsets"][n:]]
        return encoded

    def encode(self, text: str) -> list[int]:
        """A text alone. Without offsets, which take most of the time and ten times the memory."""
        ids: list[int] = []
        for start, end, token in self.parts(text):
            if token is not None:
                ids.append(token)
            else:
                before, n = (self.START, self.n_start) if start else ("", 0)
                ids += self.backend.encode(before + text[start:end])[n:]
        return ids

    def parts(self, text: str) -> Iterator[tuple[int, int, Optional[int]]]:
        """Where the special tokens in a text begin and end, with their ids, and the parts between them, with None."""
        start = 0
        for match in self.special.finditer(text):
            if match.start() > start:
                yield start, match.start(), None
            yield *match.span(), self.added[match[0]]
            start = match.end()
        if len(text) > start:
            yield start, len(text), None

    @cached_property
    def per_token(self) -> Optional[int]:
        """Characters of a normalized text that one token stands for, at most. None where a token stands for anything
        unknown."""
        pieces = [self.backend.id_to_piece(i) for i in range(self.backend.vocab_size())]
        return max(map(len, [*pieces, *self.added])) if set(pieces) >= BYTES else None

    def least(self, text: str) -> int:
        if self.per_token is None:
            return 0
        normalized = self.backend.normalize(text).replace("▁", "")  # blanks around special tokens may vanish
        return math.ceil(len(normalized) / self.per_token)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        parts: list[str] = []
        kept = [i for i in ids if not (skip_special and i in self.hidden)]
        for is_text, run in itertools.groupby(kept, key=lambda i: i in self.texts):
            if is_text:
                parts.append("".join(self.texts[i] for i in run))
            elif parts:
                parts.append(self.backend.decode([*self.backend.encode(self.START), *run])[len(self.START) :])
            else:
                parts.append(self.backend.decode(list(run)))
        return "".join(parts)


AS_IN_FILE = (
    "mistral mixtral stablelm phi3 olmo2 olmo3 granite".split()
)  # families whose tokenizer.json is left as it is
CLASSES = {  # the class that a family has where the folder names none
    **dict.fromkeys(("gpt2", "phi"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
}
CLASS_TOKENS = {  # BOS and EOS of a class where the folder names none
    "LlamaTokenizer": ("<s>", "</s>"),
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "Qwen2Tokenizer": (None, "<|endoftext|>"),
    "GemmaTokenizer": ("<bos>", "<eos>"),
}


def tokenizer_class(fields: dict[str, Any], model_type: Optional[str]) -> str:
    """The class that `transformers` takes for a folder, without `Fast`; empty for the general one."""
    named = fields.get("tokenizer_class")
    if model_type in AS_IN_FILE:
        return ""
    return str(named).removesuffix("Fast") if named else CLASSES.get(str(model_type), "")


def token_fields(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the special tokens and the added ones that older folders have in files of their
    own; as in `transformers`, those files are read only where it lists no added tokens itself."""
    fields = optional_json(folder / "tokenizer_config.json")
    if fields.get("added_tokens_decoder") is None:
        fields = fields | optional_json(folder / "special_tokens_map.json")
        named = named_tokens(fields)
        added = optional_json(folder / "added_tokens.json")
        fields["added_tokens_decoder"] = {
            i: {"content": text, "normalized": text not in named, "special": text in named} for text, i in added.items()
        }
    return fields


def named_tokens(fields: dict[str, Any]) -> list[str]:
    """The special tokens that have a name in `tokenizer_config.json`, or are listed there."""
    named = [fields.get(key) for key in SPECIAL_TOKENS]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = fields.get(key) or []
        named += listed.values() if isinstance(listed, dict) else listed
    return [text for token in named if (text := token_text(token))]


def copy_files(source: Path, target: Path) -> None:
    """Copy what belongs to the tokenizer of a folder."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES, dirs_exist_ok=True)


def save_stop(folder: Path, stop: Optional[int], model: dict[str, Any]) -> None:
    """Add the token that ends a trained answer to `eos_token_id` in the `generation_config.json` of a folder, so that
    other programs stop there too. A file that names it already stays as it is.

    Args:
        model: The `config.json` of the model, whose ids hold where the folder has no `generation_config.json`.
    """
    path = folder / GENERATION
    fields = optional_json(path) or {
        k: model[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in model
    }
    known = [i for i in as_list(fields.get("eos_token_id")) if i is not None]
    if stop is not None and stop not in known:
        fields = fields | {"eos_token_id": [*known, stop] if known else stop}
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if is_there(path) else {}


def token_text(token: Any) -> Optional[str]:
    """The text of a token in `tokenizer_config.json`, which may be a string or an object."""
    return token["content"] if isinstance(token, dict) else token


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
