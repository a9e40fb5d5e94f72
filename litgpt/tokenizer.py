"""Text to token ids and back, as the checkpoint's own tokenizer does it."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.prompts import PromptStyle

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)  # what belongs to the tokenizer of a folder, and is copied with it


class Encoded(Protocol):
    """The tokens of a text."""

    ids: list[int]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The first token that holds some of the characters from `start` to `end`, and the one behind the last."""
        ...


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: Has `tokenizer.json` or `tokenizer.model`.
        model_folder: Has the `config.json` that may name BOS and EOS; by default the same.

    Raises:
        UserError: it has neither, or what it has cannot be read.
    """

    def __init__(self, folder: Path, model_folder: Optional[Path] = None) -> None:
        self.folder = folder
        fields = optional_json(folder / "tokenizer_config.json")
        self.bos_token, self.eos_token = token_text(fields.get("bos_token")), token_text(fields.get("eos_token"))
        self.backend: _Tokenizers | _SentencePiece
        if (folder / "tokenizer.json").is_file():
            self.backend = _Tokenizers(folder / "tokenizer.json", fields)
        elif (folder / "tokenizer.model").is_file():
            self.backend = _SentencePiece(folder / "tokenizer.model", fields.get("add_bos_token", True))
        else:
            raise UserError(f"{folder} has no tokenizer.json and no tokenizer.model.")
        model = optional_json((model_folder or folder) / "config.json")
        generation = optional_json(folder / "generation_config.json")
        self.bos_id = self.token_id(self.bos_token, model.get("bos_token_id"))
        self.eos_id = self.token_id(self.eos_token, model.get("eos_token_id"))
        stops = [self.eos_id, *as_list(model.get("eos_token_id")), *as_list(generation.get("eos_token_id"))]
        self.stop_ids = frozenset(i for i in stops if i is not None)

    def token_id(self, token: Optional[str], otherwise: Any) -> Optional[int]:
        found = self.backend.token_id(token) if token else None
        return found if found is not None else next(iter(as_list(otherwise)), None)

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

    def fingerprint(self) -> str:
        """Changes when the tokenizer does."""
        digest = hashlib.sha256()
        for name in FILES:
            if (self.folder / name).is_file():
                digest.update(name.encode() + (self.folder / name).read_bytes())
        return digest.hexdigest()

    def encode(self, text: str, special: bool = True, eos: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Special tokens written in it become those tokens.
            special: Whether the tokenizer adds what it adds by itself, such as BOS; never a second BOS.
            eos: Whether EOS follows.
        """
        ids = self.encode_batch([text], [special])[0].ids
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def encode_batch(self, texts: Sequence[str], special: Sequence[bool]) -> list[Encoded]:
        """Ids and character offsets of many texts, on all cores; `special` as in `encode`, for each text."""
        bos = self.bos_token or "\0"
        wanted = [s and not text.startswith(bos) for s, text in zip(special, texts)]
        encoded: dict[int, Encoded] = {}
        for flag in (True, False):
            numbers = [i for i, w in enumerate(wanted) if w is flag]
            encoded.update(zip(numbers, self.backend.encode_batch([texts[i] for i in numbers], flag)))
        return [encoded[i] for i in range(len(texts))]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special)

    def decode_stream(self, prompt: Sequence[int], new: Iterable[int]) -> Iterator[str]:
        """The text that each of the `new` ids adds behind `prompt`; a character is held back until it is whole."""
        ids = list(prompt)  # all of it at first: a part may begin within a character
        start, shown = 0, len(ids)  # ids[start:shown] were shown; they are the context for the next ones
        for i in new:
            ids.append(i)
            before, after = self.decode(ids[start:shown]), self.decode(ids[start:])
            if len(after) > len(before) and not after.endswith("\ufffd"):
                yield after[len(before) :]
                start, shown = shown, len(ids)
        rest = self.decode(ids[start:])[len(self.decode(ids[start:shown])) :]
        if rest:
            yield rest


class _FastEncoded:
    """What `tokenizers` returns; the places of its tokens are asked for one by one, which is quicker than all."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding
        self.ids: list[int] = encoding.ids

    def span(self, start: int, end: int) -> tuple[int, int]:
        find, places = self.encoding.char_to_token, self.encoding.token_to_chars
        first = next((t for c in range(start, end) if (t := find(c)) is not None), None)
        if first is None:
            return 0, 0
        last = next(t for c in range(end - 1, start - 1, -1) if (t := find(c)) is not None)
        while last + 1 < len(self.ids) and (place := places(last + 1)) is not None and place[0] < end:
            last += 1  # one character, several tokens
        return first, last + 1


@dataclass
class _PieceEncoded:
    """What sentencepiece returns; the first bytes of a character that is written as bytes stand for (i, i), an added
    BOS for (0, 0)."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def span(self, start: int, end: int) -> tuple[int, int]:
        if start >= end:
            return 0, 0
        first = bisect_left(self.offsets, start + 1, key=lambda o: o[1])
        while first > 1 and self.offsets[first - 1] == (start, start):
            first -= 1
        return first, bisect_left(self.offsets, end, lo=first, key=lambda o: o[0])


class _Tokenizers:
    """A `tokenizer.json`. As in `transformers`, a `LlamaTokenizer` puts its blank before a text and not before each
    part between special tokens, whatever the file says; the file alone says which special tokens are added."""

    def __init__(self, file: Path, fields: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import pre_tokenizers

        try:
            self.backend = Backend.from_file(str(file))
        except Exception as e:  # the library raises a bare Exception for a file that it cannot read
            raise UserError(f"{file} cannot be read: {e}.") from e
        is_llama = str(fields.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
        if is_llama and getattr(self.backend.model, "byte_fallback", False):  # the older kind, made from sentencepiece
            scheme = "always" if fields.get("legacy") else "first"
            scheme = "never" if fields.get("add_prefix_space") is False else scheme
            self.backend.normalizer = None  # type: ignore[assignment]
            self.backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        self.backend.no_truncation()  # a file may have kept them from a training run
        self.backend.no_padding()
        self.vocab_size = self.backend.get_vocab_size()

    @property
    def special_tokens(self) -> list[str]:
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    def token_id(self, token: str) -> Optional[int]:
        return self.backend.token_to_id(token)

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[Encoded]:
        encodings = self.backend.encode_batch(texts, add_special_tokens=special)
        return [_FastEncoded(e) for e in encodings]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special)


class _SentencePiece:
    """A `tokenizer.model`."""

    def __init__(self, file: Path, add_bos: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.backend = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{file} cannot be read: {e}.") from e
        self.add_bos = add_bos
        self.vocab_size = self.backend.vocab_size()
        self.special = re.compile("|".join(map(re.escape, self.special_tokens)) or "(?!)")

    @property
    def special_tokens(self) -> list[str]:
        ids = range(self.vocab_size)
        return [self.backend.id_to_piece(i) for i in ids if self.backend.is_control(i)]

    def token_id(self, token: str) -> Optional[int]:
        found = self.backend.piece_to_id(token)
        return None if found == self.backend.unk_id() and token != "<unk>" else found

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[Encoded]:
        bos = [self.backend.bos_id()] if special and self.add_bos else []
        encoded: list[Encoded] = []
        for text in texts:
            ids, offsets, start = [*bos], [(0, 0)] * len(bos), 0
            for match in (*self.special.finditer(text), None):
                end = match.start() if match else len(text)
                if end > start:
                    before = "\n" if start else ""  # inside a text nothing gets the blank that stands before a text
                    n = len(self.backend.encode(before))
                    found = self.backend.encode(before + text[start:end], out_type="offset_mapping")
                    ids += found["ids"][n:]
                    shift = start - len(before)
                    offsets += [(shift + a, shift + b) for a, b in found["offsets"][n:]]
                if match:
                    ids.append(self.backend.piece_to_id(match[0]))
                    offsets.append(match.span())
                    start = match.end()
            encoded.append(_PieceEncoded(ids, offsets))
        return encoded

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self.backend.decode([i for i in ids if not (skip_special and self.backend.is_control(i))])


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def token_text(token: Any) -> Optional[str]:
    """The text of a token in `tokenizer_config.json`, which may be a string or an object."""
    return token["content"] if isinstance(token, dict) else token


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
