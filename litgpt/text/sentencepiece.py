"""Tokenizers of the library `sentencepiece`."""

import itertools
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from litgpt.text.length_bound import BYTE_TOKENS
from litgpt.text.token_fields import named_tokens

START = "\x01"  # precedes a part within a text, so that it does not get the blank that a text begins with


@dataclass
class SentencePieceEncoding:
    """The tokens of a text. If a character is written as bytes, the offsets of all but the last byte are (i, i); those
    of tokens added at the beginning are (0, 0)."""

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


class SentencePieceTokenizer:
    """A `tokenizer.model`, with the special tokens that the files beside it add.

    Attributes:
        before, after: The ids that are added around a text.
        ends: BOS and EOS, as the model names them.
    """

    def __init__(self, file: Path, fields: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.backend = SentencePieceProcessor(model_file=str(file))
        n, named = self.backend.vocab_size(), named_tokens(fields)
        controls = {self.backend.id_to_piece(i): i for i in range(n) if self.backend.is_control(i)}
        listed = {t["content"]: int(i) for i, t in fields["added_tokens_decoder"].items()}
        beyond = {token: i for token, i in listed.items() if i >= n}
        self.added = controls | beyond  # the id of each special token
        self.texts = {i: token for token, i in self.added.items()}
        flags = {t["content"]: t.get("special", False) for t in fields["added_tokens_decoder"].values()}
        self.hidden = {i for token, i in self.added.items() if token in controls or token in named or flags[token]}
        self.vocab_size = max([n, *(i + 1 for i in beyond.values())])
        matched = self.added.keys() - (self.texts[i] for i in self.hidden if fields.get("split_special_tokens"))
        longest_first = sorted(matched, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        bos, eos = self.backend.bos_id(), self.backend.eos_id()
        self.before = [bos] if fields.get("add_bos_token", True) and bos >= 0 else []
        self.after = [eos] if fields.get("add_eos_token") and eos >= 0 else []
        self.ends = tuple(self.backend.id_to_piece(i) if i >= 0 else None for i in (bos, eos))
        self.n_start = len(self.backend.encode(START))

    @property
    def special_tokens(self) -> list[str]:
        return list(self.added)

    def token_id(self, token: str) -> Optional[int]:
        found = self.added.get(token, self.backend.piece_to_id(token))
        return found if found in self.texts or self.backend.id_to_piece(found) == token else None

    def encode_batch(self, texts: Sequence[str]) -> list[SentencePieceEncoding]:
        return [self.encode_one(text) for text in texts]

    def encode_one(self, text: str) -> SentencePieceEncoding:
        encoded = SentencePieceEncoding([], [])
        for start, end, token in self.parts(text):
            if token is not None:
                encoded.ids.append(token)
                encoded.offsets.append((start, end))
                continue
            before, n = (START, self.n_start) if start else ("", 0)
            found = self.backend.encode(before + text[start:end], out_type="offset_mapping")
            shift = start - len(before)
            encoded.ids += found["ids"][n:]
            encoded.offsets += [(shift + a, shift + b) for a, b in found["offsets"][n:]]
        return encoded

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without offsets: they take most of the time and ten times the memory."""
        ids: list[int] = []
        for start, end, token in self.parts(text):
            if token is not None:
                ids.append(token)
            else:
                before, n = (START, self.n_start) if start else ("", 0)
                ids += self.backend.encode(before + text[start:end])[n:]
        return ids

    def parts(self, text: str) -> Iterator[tuple[int, int, Optional[int]]]:
        """Start and end of the special tokens in a text, with their ids, and of the parts between them, with None."""
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
        """The most characters of a normalized text that one token represents. None if a token may represent any
        unknown text."""
        pieces = [self.backend.id_to_piece(i) for i in range(self.backend.vocab_size())]
        return max(map(len, [*pieces, *self.added])) if set(pieces) >= BYTE_TOKENS else None

    def least(self, text: str) -> int:
        """A lower bound of the number of tokens, without tokenizing."""
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
                parts.append(self.backend.decode([*self.backend.encode(START), *run])[len(START) :])
            else:
                parts.append(self.backend.decode(list(run)))
        return "".join(parts)
