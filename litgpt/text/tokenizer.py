"""Text to token ids and back, as the checkpoint's own tokenizer does it."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Protocol

from litgpt.errors import BUGS, UserError
from litgpt.storage.files import TOKENIZER_BYTES, check_size, is_there
from litgpt.text.fast_tokenizer import FastTokenizer, build_bpe, read_backend
from litgpt.text.prompts import MORE_TEMPLATES, TEMPLATE, TEMPLATE_FIELDS, PromptStyle
from litgpt.text.sentencepiece import SentencePieceTokenizer
from litgpt.text.token_fields import CLASS_TOKENS, optional_json, special_token, token_fields, tokenizer_class

GENERATION = "generation_config.json"
FILES = (  # what belongs to the tokenizer of a folder, and to the processor of images, and is copied with it
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    TEMPLATE,
    *TEMPLATE_FIELDS,
    GENERATION,
)
PROBE = "Two tokenizers agree: 0123456789, naïve café, 東京.\n\tdef f(x): return x"


class TooLong(UserError):
    """A text has more tokens than the model reads."""


class Encoded(Protocol):
    """The tokens of a text."""

    ids: list[int]

    def surround(self, before: list[int], after: list[int]) -> None:
        """Put ids around those of the text."""
        ...

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that contain any of the characters from `start` to `end`, as a half-open range."""
        ...


class Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: Contains `tokenizer.json`, `tokenizer.model`, or `vocab.json` and `merges.txt`.
        model_folder: Contains the `config.json` that may name BOS and EOS; by default the same folder.
        n_embeddings: How many tokens the model has an embedding for, from id 0; None for any number. Many published
            tokenizers have more tokens than that, which no text may use.

    Raises:
        UserError: The folder contains none of these files, or they cannot be read.
    """

    def __init__(self, folder: Path, model_folder: Optional[Path] = None, n_embeddings: Optional[int] = None) -> None:
        self.folder, self.n_embeddings = folder, n_embeddings
        model_folder = model_folder or folder
        model = optional_json(model_folder / "config.json")
        fields = token_fields(folder)
        self.kind = tokenizer_class(fields, model.get("model_type"))
        self.backend = open_backend(folder, fields, self.kind)
        if self.kind not in CLASS_TOKENS:
            fields = dict(zip(("bos_token", "eos_token"), self.backend.ends)) | fields
        self.bos_token = special_token(fields, self.kind, "bos_token")
        self.eos_token = special_token(fields, self.kind, "eos_token")
        self.bos_id = self.token_id(self.bos_token, model.get("bos_token_id"))
        self.eos_id = self.token_id(self.eos_token, model.get("eos_token_id"))
        stops = [self.eos_id, *as_list(model.get("eos_token_id"))]
        for place in {folder, model_folder}:
            stops += as_list(optional_json(place / GENERATION).get("eos_token_id"))
        self.stop_ids = frozenset(i for i in stops if i is not None and i >= 0)

    def token_id(self, token: Optional[str], default: Any) -> Optional[int]:
        found = self.backend.token_id(token) if token else None
        return found if found is not None else next((i for i in as_list(default) if i is not None and i >= 0), None)

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size

    @property
    def special_tokens(self) -> list[str]:
        """The texts that are always one token, such as `</s>`."""
        return self.backend.special_tokens

    def stops(self, style: PromptStyle) -> frozenset[int]:
        """The tokens that end an answer: those that the model folder names, the one that the style writes, and
        those of a custom style."""
        stop = self.trained_stop(style)
        return (self.stop_ids if stop is None else self.stop_ids | {stop}) | style.stop_ids(self)

    def token_to_id(self, token: str) -> int:
        """The id of a token. Raises `UserError` if there is none."""
        found = self.backend.token_id(token)
        if found is None:
            raise UserError(f"The tokenizer in {self.folder} has no token {token!r}.")
        return found

    def trained_stop(self, style: PromptStyle) -> Optional[int]:
        """The token that ends an answer in training: the one that the style writes, else EOS."""
        end = style.turn_end(self.special_tokens)
        return self.backend.token_id(end) if end else self.eos_id

    @property
    def prefix(self) -> str:
        """What the tokenizer adds before a text by itself, such as BOS."""
        return self.decode(self.backend.before, skip_special=False)

    def fingerprint(self) -> str:
        """A hash of the tokenizer's files and class."""
        digest = hashlib.sha256(self.kind.encode())
        for name in FILES:
            if (self.folder / name).is_file():
                digest.update(name.encode())
                with open(self.folder / name, "rb") as f:
                    while chunk := f.read(1 << 20):
                        digest.update(chunk)
        return digest.hexdigest()

    def is_like(self, other: "Tokenizer") -> bool:
        """Whether another tokenizer, whose files may differ, has as many tokens and the same ids for a text."""
        return self.vocab_size == other.vocab_size and self.encode(PROBE, eos=True) == other.encode(PROBE, eos=True)

    def encode(self, text: str, special: bool = True, eos: bool = False, limit: Optional[int] = None) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Special tokens written in it become those tokens.
            special: Whether to add what the tokenizer adds by itself, such as BOS; never a second BOS.
            eos: Whether to append EOS; never a second one.
            limit: Refuse a text of this many tokens or more, without tokenizing it if its length alone is too long.

        Raises:
            TooLong: The text reaches the limit.
            UserError: The text contains half a surrogate pair, a byte that is not UTF-8, or a token that the model has
                no embedding for.
        """
        with as_user_error(self.folder, [text]):
            if limit is not None and len(text) >= limit and (least := self.backend.least(text)) >= limit:
                raise TooLong(f"The prompt has at least {least} tokens; the model reads at most {limit}.")
            encoded = self.backend.encode(text)
        if limit is not None and len(encoded) >= limit:  # before a long Python list is made
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
        """Ids and character offsets of many texts, computed on all cores; `special` as in `encode`, for each text.
        Embeddings are not checked, because one text may be wrong and the others right: call `check`."""
        with as_user_error(self.folder, texts):
            encodings: list[Encoded] = [*self.backend.encode_batch(texts)]
        before, after = self.backend.before, self.backend.after
        for encoding, add_special in zip(encodings, special):
            if add_special:
                encoding.surround(before if encoding.ids[: len(before)] != before else [], after)
        return encodings

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        with as_user_error(self.folder):
            return self.backend.decode(list(ids), skip_special)


def open_backend(folder: Path, fields: dict[str, Any], kind: str) -> FastTokenizer | SentencePieceTokenizer:
    for names in (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt")):
        if not all(is_there(folder / name) for name in names):
            continue
        for name in names:
            check_size(folder / name, TOKENIZER_BYTES)
        with as_user_error(" with ".join([str(folder / names[0]), *names[1:]])):
            if names[0] == "tokenizer.model":
                return SentencePieceTokenizer(folder / names[0], fields)
            is_complete = names[0] == "tokenizer.json"
            backend = read_backend(folder / names[0], fields, kind) if is_complete else build_bpe(folder, fields, kind)
            return FastTokenizer(backend, fields)
    raise UserError(f"{folder} has no tokenizer.json, no tokenizer.model, and no vocab.json with merges.txt.")


@contextmanager
def as_user_error(what: Any, texts: Sequence[str] = ()) -> Iterator[None]:
    """Turn whatever a library raises for an unusable tokenizer, which may be a Rust panic, or for one of the texts,
    into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as e:
        if wrong := encoding_error(texts):
            raise wrong from e
        if isinstance(e, BUGS):
            raise
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"The tokenizer in {what} cannot be used: {e}.") from e


def encoding_error(texts: Sequence[str]) -> Optional[UserError]:
    """An error about the first text that cannot be written as UTF-8; None if all can."""
    text, half = next(((text, c) for text in texts for c in text if "\ud800" <= c <= "\udfff"), ("", ""))
    if not half:
        return None
    byte = ord(half) - 0xDC00
    if 0x80 <= byte <= 0xFF:  # Python reads bytes from a shell or a pipe that are not UTF-8 as such characters
        return UserError(f"The text {text[:40]!r} is not UTF-8 (byte {byte:#x}).")
    return UserError(f"{text[:40]!r} contains half a surrogate pair, which is not text.")


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer files of a folder."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES, dirs_exist_ok=True)


def save_stops(folder: Path, tokenizer: Tokenizer, style: PromptStyle, model: dict[str, Any]) -> None:
    """Make sure that `eos_token_id` in the `generation_config.json` of a folder has all tokens that end answers in this
    style, so that other programs stop there too. A file that has them is left unchanged.

    Args:
        model: The `config.json` of the model, whose ids are used if the folder has no `generation_config.json`.
    """
    path, ids = folder / GENERATION, ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = optional_json(path) or {k: model[k] for k in ids if k in model}
    known = [i for i in as_list(fields.get("eos_token_id")) if i is not None]
    new = sorted({tokenizer.trained_stop(style), *tokenizer.stop_ids} - {None, *known})
    if new:
        stops = [*known, *new]
        fields = fields | {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    if fields and (new or not path.is_file()):
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
