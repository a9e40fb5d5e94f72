"""Text to token ids and back, as the checkpoint's own tokenizer does it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from litgpt.errors import UserError
from litgpt.files import read_json

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


class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]  # the characters that each token stands for; none, as (i, i), for an added BOS
    # and for the first bytes of a character that is written as bytes


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
            self.backend = _Tokenizers(folder / "tokenizer.json")
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

    def encode(self, text: str, special: bool = True, eos: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Special tokens written in it become those tokens.
            special: Whether the tokenizer adds what it adds by itself, such as BOS.
            eos: Whether EOS follows.
        """
        ids = self.backend.encode_batch([text], special)[0].ids
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[Encoded]:
        """Ids and character offsets of many texts, on all cores."""
        return self.backend.encode_batch(texts, special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special)

    def decode_stream(self, prompt: Sequence[int], new: Iterable[int]) -> Iterator[str]:
        """The text that each of the `new` ids adds behind `prompt`; a character is held back until it is whole."""
        ids = list(prompt[-8:])  # what stands before decides whether a blank is shown
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


class _Tokenizers:
    """A `tokenizer.json`."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self.backend = Backend.from_file(str(file))
        except Exception as e:  # the library raises a bare Exception for a file that it cannot read
            raise UserError(f"{file} cannot be read: {e}.") from e
        self.vocab_size = self.backend.get_vocab_size()

    def token_id(self, token: str) -> Optional[int]:
        return self.backend.token_to_id(token)

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[Encoded]:
        encodings = self.backend.encode_batch(texts, add_special_tokens=special)
        return [Encoded(e.ids, e.offsets) for e in encodings]

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

    def token_id(self, token: str) -> Optional[int]:
        found = self.backend.piece_to_id(token)
        return None if found == self.backend.unk_id() and token != "<unk>" else found

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[Encoded]:
        bos = [self.backend.bos_id()] if special and self.add_bos else []
        encoded = []
        for text in texts:
            found = self.backend.encode(text, out_type="offset_mapping")
            encoded.append(Encoded([*bos, *found["ids"]], [(0, 0)] * len(bos) + found["offsets"]))
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
