"""Tokenizers of the library `tokenizers`."""

import base64
import codecs
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from litgpt.storage.fields import ADDED_FLAGS
from litgpt.text.length_bound import BYTE_TOKENS, length_bound
from litgpt.text.token_fields import named_tokens, special_token

MAX_GROWTH = 1000  # how much longer a normalizer or a decoder may make a text
EACH_BYTE = "litgpt.each_byte"
codecs.register_error(EACH_BYTE, lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]


class FastEncoding:
    """The tokens of a text. Offsets are looked up one by one, which is faster than reading all of them."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding
        self.ids: list[int] = encoding.ids
        self.shift = 0  # ids that were added before

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


class FastTokenizer:
    """A tokenizer of the library `tokenizers`.

    Attributes:
        before, after: The ids that its post-processor adds around a text.
        ends: BOS and EOS as the model names them; this kind of model never does.
    """

    ends: tuple[Optional[str], ...] = (None, None)

    def __init__(self, backend: Any, fields: dict[str, Any]) -> None:
        self.backend = backend
        add_tokens(backend, fields)
        backend.encode_special_tokens = bool(fields.get("split_special_tokens"))
        probe = next((text for text in "a1. " if backend.encode(text, add_special_tokens=False).ids), "")
        bare, full = (backend.encode(probe, add_special_tokens=special).ids for special in (False, True))
        n = next((i for i in range(len(full), -1, -1) if full[i : i + len(bare)] == bare), None)
        if n is None:
            raise ValueError("its post_processor loses the text")
        self.before, self.after = full[:n], full[n + len(bare) :]
        self.vocab_size = backend.get_vocab_size()
        self.bytes: dict[int, int] = {}  # the byte of each byte token
        if "ByteFallback" in str(backend.decoder):
            found = {backend.token_to_id(token): i for i, token in enumerate(BYTE_TOKENS)}
            self.bytes = found if None not in found else {}

    @property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    def token_id(self, token: str) -> Optional[int]:
        return self.backend.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[FastEncoding]:
        return [FastEncoding(e) for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def encode(self, text: str) -> Any:
        """One text: an object with a length and `ids`, without offsets, which take half of the time."""
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0]

    @cached_property
    def bound(self) -> Optional[tuple[float, str]]:
        return length_bound(self.backend)

    def least(self, text: str) -> int:
        """A lower bound of the number of tokens, without tokenizing."""
        if self.bound is None:
            return 0
        per_token, dropped = self.bound
        return math.ceil(len(re.sub(dropped, "", text) if dropped else text) / per_token)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        if self.bytes:
            ids = self.repair_bytes([i for i in ids if i not in self.hidden] if skip_special else ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    @cached_property
    def hidden(self) -> set[int]:
        """The special tokens, which are not part of the text. Bytes before and after one may form a character."""
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def repair_bytes(self, ids: list[int]) -> list[int]:
        """Replace each byte that is not part of a character by a replacement character. The library replaces the
        complete run of bytes: an answer that ends within a character would lose the characters before it."""
        if self.bytes.keys().isdisjoint(ids):
            return ids
        tokens = {byte: i for i, byte in self.bytes.items()}
        repaired: list[int] = []
        for is_bytes, run in itertools.groupby(ids, key=self.bytes.__contains__):
            part = list(run)
            if is_bytes:
                part = [tokens[b] for b in bytes(self.bytes[i] for i in part).decode(errors=EACH_BYTE).encode()]
            repaired += part
        return repaired


def read_backend(file: Path, fields: dict[str, Any], kind: str) -> Any:
    """A `tokenizer.json`, as `transformers` reads it.

    Two classes override the file: `LlamaTokenizer` adds its blank before the text only, not before each part between
    special tokens, and `GPTNeoXTokenizer` adds nothing.
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
    """Raise `ValueError` for a character table that claims to be larger than it is. The library would allocate that
    much memory, or end the process."""
    for found in re.finditer(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"', data):
        table = base64.b64decode(found[1])
        if int.from_bytes(table[:4], "little") > len(table):
            raise ValueError("its precompiled_charsmap is damaged")


def check_growth(part: Any) -> None:
    """Raise `ValueError` if a part of a tokenizer would make a text very much longer. The library would run out of
    memory and end the process."""
    growth, added = 1.0, 0
    for step in steps_in(json.loads(part.__getstate__())) if part is not None else ():
        if step.get("type") == "Replace":
            old = step["pattern"].get("String", "")
            growth *= max(1.0, len(step["content"]) / max(1, len(old)) + (not old))
        added += len(step.get("prepend") or "") + len(step.get("single") or ())
    if growth > MAX_GROWTH or added > MAX_GROWTH:
        raise ValueError(f"it makes a text more than {MAX_GROWTH:,} times as long")


def steps_in(value: Any) -> Iterator[dict[str, Any]]:
    """All objects within a JSON value, the innermost first."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from steps_in(inner)
    if isinstance(value, dict):
        yield value


QWEN_WORDS = (  # as in its published tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_bpe(folder: Path, fields: dict[str, Any], kind: str) -> Any:
    """The byte-level BPE of a `vocab.json` and a `merges.txt`, with the pre-tokenizer of the tokenizer's class."""
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
    bos = special_token(fields, kind, "bos_token") if fields.get("add_bos_token") else None
    eos = special_token(fields, kind, "eos_token") if fields.get("add_eos_token") else None
    add_tokens(backend, fields)
    around = {t: i for t in (bos, eos) if t and (i := backend.token_to_id(t)) is not None}
    template = " ".join([*([bos] if bos in around else []), "$A", *([eos] if eos in around else [])])  # type: ignore
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(around.items()))  # type: ignore
    return backend


def add_tokens(backend: Any, fields: dict[str, Any]) -> None:
    """Add the special tokens that only the files beside `tokenizer.json` name. Existing ones are left unchanged."""
    from tokenizers import AddedToken

    for _, token in sorted(fields["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
        flags = {name: token[name] for name in ADDED_FLAGS if token.get(name) is not None}
        backend.add_tokens([AddedToken(token["content"], **flags)])
    backend.add_special_tokens(named_tokens(fields))
