"""From rows to token ids: the one path for every data set."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.data.batches import TokenizedRows
from litgpt.errors import UserError, kind
from litgpt.prompts import Message, Piece, PromptStyle, choose_style
from litgpt.tokenizer import Tokenizer

Row = Sequence[Message]  # a conversation whose last message is the answer


class DataModule:
    """Rows to train on and rows to judge by. A data set is a subclass that implements `rows`.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts.
        val_split_fraction: The share of the rows that is held back for validation, at least 0 and below 1.
        prompt_style: The name of a style; `chat` for the checkpoint's chat template; `auto` for that or, without
            one, alpaca.
        ignore_index: Accepted for older recipes; tokens that are not trained carry no number here.
        seed: Chooses the rows that are held back.
        num_workers: Accepted for older recipes; the tokens are made once, before the first step.
    """

    def __init__(
        self,
        mask_prompt: bool = False,
        val_split_fraction: Optional[float] = None,
        prompt_style: str = "auto",
        ignore_index: int = -100,
        seed: int = 42,
        num_workers: int = 4,
    ) -> None:
        if val_split_fraction is not None and not 0 <= val_split_fraction < 1:
            raise UserError(f"--data.val_split_fraction {val_split_fraction} must be at least 0 and below 1.")
        self.mask_prompt = mask_prompt
        self.val_split_fraction = val_split_fraction
        self.prompt_style = prompt_style
        self.seed = seed
        self.held_back: list[Row] = []  # the validation rows, once loaded

    @abstractmethod
    def rows(self) -> tuple[list[Row], Optional[list[Row]]]:
        """The rows for training and those for validation; None if the latter are to be held back from the former."""

    def load(
        self, tokenizer: Tokenizer, folder: Path, max_seq_length: int
    ) -> tuple[TokenizedRows, TokenizedRows, PromptStyle]:
        """Token ids of the training and the validation rows, and the prompt style that made them.

        Args:
            tokenizer: The checkpoint's.
            folder: The checkpoint, whose chat template may be wanted.
            max_seq_length: Longer rows are cut to so many tokens.

        Raises:
            UserError: the rows cannot be read or used.
        """
        style = choose_style(self.prompt_style, folder)
        train, val = self.rows()
        if val is None:
            train, val = self.split(train)
        self.held_back = val
        sets = [tokenize(rows, tokenizer, style, max_seq_length, self.mask_prompt) for rows in (train, val)]
        if not len(sets[0]):
            raise UserError("No row is left to train on: none has a trained token within --train.max_seq_length.")
        return sets[0], sets[1], style

    def split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        fraction = 0.05 if self.val_split_fraction is None else self.val_split_fraction
        n_val = max(1, round(fraction * len(rows))) if fraction and len(rows) > 1 else 0
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [rows[i] for i in sorted(order[n_val:])], [rows[i] for i in sorted(order[:n_val])]


def tokenize(
    rows: Sequence[Row], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int, mask_prompt: bool
) -> TokenizedRows:
    """Token ids of `rows`, each rendered and tokenized once. Rows without a trained token are left out and counted."""
    pieces = [style.pieces(row) for row in rows]
    texts = ["".join(text for text, _ in row) for row in pieces]
    encoded = tokenizer.encode_batch(texts, special=not style.own_special_tokens)
    made = TokenizedRows.Builder()
    for row, (ids, offsets) in zip(pieces, encoded):
        trained = trained_tokens(row, offsets) if mask_prompt else [True] * len(ids)
        if not style.own_special_tokens and tokenizer.eos_id is not None:
            ids, trained = [*ids, tokenizer.eos_id], [*trained, True]
        made.add(ids, trained, max_seq_length)
    return made.build()


def trained_tokens(pieces: Sequence[Piece], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of an answer."""
    spans, start = [], 0
    for text, is_answer in pieces:
        if is_answer and text:
            spans.append((start, start + len(text)))
        start += len(text)
    trained, at = [], 0
    for begin, end in offsets:
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        trained.append(at < len(spans) and (end > spans[at][0] or begin == spans[at][0]))
    return trained


def instruction_row(fields: Any, where: str) -> Row:
    """A row in the Alpaca form, `instruction`, `input` (may be missing) and `output`, as messages.

    Raises:
        UserError: it is of another form; the message begins with `where`.
    """
    if not isinstance(fields, dict):
        raise UserError(
            f"{where} is {kind(fields)}, not an object with instruction and output "
            '(as {"instruction": "...", "input": "...", "output": "..."}).'
        )
    missing = [k for k in ("instruction", "output") if k not in fields]
    if missing:
        raise UserError(f"{where} lacks {' and '.join(missing)}; it has {', '.join(map(str, fields)) or 'no keys'}.")
    text = {k: fields.get(k) if fields.get(k) is not None else "" for k in ("instruction", "input", "output")}
    for key, value in text.items():
        if not isinstance(value, str):
            raise UserError(f"{where} has {key} {str(value)[:40]!r}, which is {kind(value)} and not text.")
    user = {"role": "user", "content": text["instruction"], "input": text["input"]}
    return [user, {"role": "assistant", "content": text["output"]}]
