"""LitGPT's `Tokenizer`: tensors of token IDs. Everything inside litgpt uses `litgpt.text.tokenizer`."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

import torch

from litgpt.errors import UserError
from litgpt.text import tokenizer as inner
from litgpt.text.fast_tokenizer import FastTokenizer
from litgpt.text.token_fields import optional_json

WITH_BOS = r"(Meta-)?Llama-3|SmolLM2-.*-Instruct"  # models whose texts begin with BOS, whatever their files say
LONGEST_CHARACTER = 4  # bytes, and therefore tokens, that one character may take


class NoFolder(UserError, NotADirectoryError):
    """The checkpoint folder does not exist."""


class NoTokenizer(UserError, NotImplementedError):
    """The folder has no tokenizer, or the tokenizer lacks a token that is needed."""


class Tokenizer:
    """The tokenizer of a checkpoint folder, as in LitGPT.

    Args:
        checkpoint_dir: Contains `tokenizer.json`, `tokenizer.model`, or `vocab.json` and `merges.txt`.

    Attributes:
        inner: The `litgpt.text.tokenizer.Tokenizer` that does the work.
        processor: The tokenizer of the library `tokenizers` or `sentencepiece`.
        backend: `huggingface` or `sentencepiece`.
        use_bos: Whether `encode` adds BOS by default.
        bos_id, eos_id: None if the tokenizer has no such token.
    """

    def __init__(self, checkpoint_dir: Union[str, Path]) -> None:
        folder = Path(checkpoint_dir)
        if not folder.is_dir():
            raise NoFolder(f"The checkpoint folder {folder} does not exist.")
        names = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
        if not any(all((folder / name).exists() for name in group) for group in names):
            raise NoTokenizer(f"{folder} has no tokenizer.json, no tokenizer.model, and no vocab.json with merges.txt.")
        self.model_name = folder.stem
        self.inner = inner.Tokenizer(folder)
        self.processor: Any = self.inner.backend.backend
        self.backend = "huggingface" if isinstance(self.inner.backend, FastTokenizer) else "sentencepiece"
        generation = optional_json(folder / inner.GENERATION)
        self.bos_id = first(self.inner.bos_id, generation.get("bos_token_id"))
        self.eos_id = first(self.inner.eos_id, generation.get("eos_token_id"))
        added = optional_json(folder / "tokenizer_config.json").get("add_bos_token")
        by_itself = self.inner.kind == "LlamaTokenizer" or self.bos_id in self.inner.backend.before[:1]
        by_itself |= re.match(WITH_BOS, folder.name) is not None
        self.use_bos = bool(self.bos_id is not None and by_itself if added is None else added)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without those that files beside a `tokenizer.json` add."""
        if self.backend == "huggingface":
            return self.processor.get_vocab_size(with_added_tokens=False)
        return self.processor.vocab_size()

    def token_to_id(self, token: str) -> int:
        """Raises `UserError`, a `ValueError`, if there is no such token."""
        found = self.inner.backend.token_id(token)
        if found is None:
            raise UserError(f"The tokenizer has no token {token!r}.")
        return found

    def encode(
        self,
        string: str,
        device: Optional[torch.device] = None,
        bos: Optional[bool] = None,
        eos: bool = False,
        max_length: int = -1,
    ) -> torch.Tensor:
        """Token IDs of a text, (T,), int32.

        Args:
            string: Special tokens written in it become those tokens.
            device: Device of the result.
            bos: Whether it begins with BOS; by default `use_bos`.
            eos: Whether it ends with EOS.
            max_length: Truncate to this many tokens; not if it is below 1.
        """
        ids = self.inner.encode(string)
        if bos or (bos is None and self.use_bos):
            if self.bos_id is None:
                raise NoTokenizer("The tokenizer has no BOS token. Use bos=False.")
            ids = ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]
        elif self.bos_id is not None and ids[:1] == [self.bos_id]:
            ids = ids[1:]
        if eos:
            if self.eos_id is None:
                raise NoTokenizer("The tokenizer has no EOS token. Use eos=False.")
            ids = ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id]
        elif self.eos_id is not None and ids[-1:] == [self.eos_id]:
            ids = ids[:-1]
        return torch.tensor(ids[:max_length] if max_length > 0 else ids, dtype=torch.int, device=device)

    def decode(self, tensor: torch.Tensor) -> str:
        """The text of token IDs, () or (T,), without special tokens. A single token keeps its leading space."""
        ids = tensor.flatten().tolist()
        return self.after([], ids) if len(ids) == 1 else self.inner.decode(ids)

    def decode_stream(
        self, token_stream: Iterable[torch.Tensor], device: Optional[torch.device] = None
    ) -> Iterator[str]:
        """Yield the text of a stream of token IDs, each () or (T,). Tokens that end within a character are held until
        the rest of it arrives. `device` is not used."""
        done: list[int] = []  # enough of the tokens before, for what depends on them
        held: list[int] = []
        is_first = True
        for tokens in token_stream:
            held += tokens.flatten().tolist()
            text = self.inner.decode(held) if is_first else self.after(done, held)
            if text and (not text.endswith("\ufffd") or len(held) >= LONGEST_CHARACTER):
                yield text
                done, held, is_first = (done + held)[-LONGEST_CHARACTER:], [], False
        if held and (text := self.inner.decode(held) if is_first else self.after(done, held)):
            yield text

    def after(self, before: list[int], ids: list[int]) -> str:
        """The text that `ids` add after the tokens `before`. A leading space belongs to it."""
        before = before or self.inner.encode("a", special=False)
        start = self.inner.decode(before)
        whole = self.inner.decode([*before, *ids])
        return whole[len(start) :] if whole.startswith(start) else self.inner.decode(ids)


def first(own: Optional[int], others: Any) -> Optional[int]:
    """The tokenizer's own ID, or the first of those in another file."""
    return own if own is not None else inner.as_list(others)[0] if inner.as_list(others) else None
