"""Data sets: training and validation rows as tokens."""

import itertools
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch

from litgpt.data.columns import as_option, match
from litgpt.data.forms import rename
from litgpt.data.render import with_remedy
from litgpt.data.row_files import Rows
from litgpt.data.sources import RowSource, TextPiece
from litgpt.data.token_maker import Progress, TokenMaker
from litgpt.data.tokens import Counts, Details, TokenizedRows
from litgpt.errors import UserError
from litgpt.text.prompt_style import clock_at
from litgpt.text.prompts import PromptStyle, choose_style
from litgpt.text.tokenizer import Tokenizer

CHAT_FORMS = ("messages", "sharegpt", "history", "preference", "label")
TrainOn = Literal["assistant", "last", "all"]
Unit = Literal["row", "pair", "label"]  # a row is an answer, a chosen and a rejected one, or one with a label
PREFERENCES = {  # forms of rows that are meant for other commands, and what happens to them
    "preference": "have a chosen and a rejected answer; chosen is trained, rejected is ignored. To train preferences: "
    "litgpt finetune dpo",
    "ranked": "have several answers; the best one is trained. To train preferences: litgpt finetune dpo",
    "label": "have a label; answers whose label is false are skipped. To train on both kinds: litgpt finetune kto",
}
MAX_SHARED = 0.1  # fraction of the validation rows that may be training rows as well


@dataclass
class TokenizedDataset:
    """The rows that a run trains and validates on.

    Args:
        train: Training rows.
        val: Validation rows.
        style: The prompt style of the rows.
        turn_end: The text of the token that ends an answer.
        sources: The sources of the training rows, and what happened to the rows of each.
        val_sources: The same for separate validation rows, or None.
        mask_prompt: Whether only answers are trained on.
        cached: Whether the tokens came from the cache.
        below_context: Whether the model could read longer rows than the limit.
        plain_text: Whether the rows are texts without a prompt style.
        n_duplicates: Training rows that were dropped because they are equal to an earlier one.
        unit: What a row is.
    """

    train: TokenizedRows
    val: TokenizedRows
    style: PromptStyle
    turn_end: Optional[str]
    sources: list[tuple[RowSource, Counts]]
    val_sources: Optional[list[tuple[RowSource, Counts]]]
    mask_prompt: bool
    cached: bool
    below_context: bool
    plain_text: bool = False
    n_duplicates: int = 0
    unit: Unit = "row"

    @property
    def n_shared(self) -> int:
        """Validation rows that are also training rows. Weights, which repeat rows on purpose, do not count."""
        return int(torch.isin(self.val.row_hashes(), self.train.unweighted().row_hashes()).sum())

    @property
    def counts(self) -> Counts:
        """What happened to the training rows that were read."""
        return sum((counts for _, counts in self.sources), Counts())

    @property
    def val_counts(self) -> Optional[Counts]:
        return None if self.val_sources is None else sum((counts for _, counts in self.val_sources), Counts())

    @property
    def all_sources(self) -> list[tuple[RowSource, Counts]]:
        return [*self.sources, *(self.val_sources or [])]

    def notes(self) -> list[str]:
        """What happened to the rows that a user may not expect."""
        found = []
        for source, counts in self.all_sources:
            if counts.columns:  # of inherited columns, the file may have none
                set_already = {
                    ours: theirs for ours, theirs in (source.columns or {}).items() if theirs in counts.mapped
                }
                path = source.path if len(self.all_sources) > 1 else None
                option = as_option({**set_already, **counts.columns}, path)
                found.append(f"{source.path}: columns recognized by similar names. To set them, pass {option}")
        counts = sum((counts for _, counts in self.all_sources), Counts())
        if counts.ignored:
            ignored = sorted(counts.ignored.items(), key=lambda item: -item[1])
            names = ", ".join(f"{name.strip() or repr(name)} ({n:,} rows)" for name, n in ignored[:20])
            found.append(f"Ignored columns and fields: {names}{', ...' if len(ignored) > 20 else ''}.")
        if counts.as_text:
            found.append(f"{counts.as_text:,} rows have parts that became texts of their messages.")
        if counts.dropped_lost:
            found.append(f"{counts.dropped_lost:,} rows dropped: the prompt style does not show all of their parts.")
        for form, command in PREFERENCES.items():
            if self.unit == "row" and (n := counts.forms.get(form, 0) + (counts.skipped if form == "label" else 0)):
                found.append(f"{n:,} rows {command}")
        if self.n_duplicates:
            found.append(f"{self.n_duplicates:,} duplicate rows dropped.")
        if self.val_sources is not None and 0 < (n := self.n_shared) <= MAX_SHARED * len(self.val):
            found.append(f"{n:,} of {len(self.val):,} validation rows are also training rows.")
        return found


class DataModule(ABC):
    """Training and validation rows. A data set is a subclass that implements `sources`.

    Args:
        mask_prompt: Train on the answers only, not on the prompts. If null: true for conversations and for rows
            rendered by a chat template, false for instruction rows in a named style.
        val_split_fraction: Fraction of the rows that is held out for validation, at least 0 and below 1. If null: 0.05
            unless there are validation rows.
        prompt_style: Prompt style of the rows: auto for the checkpoint's chat template or, without one, the style that
            is known by the model's name, else alpaca for instruction rows and chatml for conversations; chat for the
            template; the name of a style; none; or a file with a Jinja template.
        train_on: What to train on: assistant for all answers, last for the last answer of each row, or all for
            prompts too. Replaces mask_prompt.
        too_long: What to do with rows longer than train.max_seq_length: cut (truncate), drop, or stop with an error.
        on_bad_row: What to do with rows that cannot be used: stop with an error, or skip and count them.
        on_lost: What to do with rows whose system message, tools, tool calls, or reasoning the prompt style does not
            show: stop with an error, drop_row, or as_text to write these parts into the texts of the messages.
        duplicates: Whether to keep or drop training rows that are equal to an earlier one.
        template_kwargs: Variables for the chat template, such as {enable_thinking: false}. Saved with the result.
        ignore_index: Ignored; accepted for older recipes.
        seed: Seed for the choice of held-out rows.
        num_workers: Ignored; accepted for older recipes.
    """

    packed = False  # whether packing is on by default
    unit: Unit = "row"  # what a row must be

    def __init__(
        self,
        mask_prompt: Optional[bool] = None,
        val_split_fraction: Optional[float] = None,
        prompt_style: str = "auto",
        train_on: Optional[TrainOn] = None,
        too_long: Literal["cut", "drop", "error"] = "cut",
        on_bad_row: Literal["error", "skip"] = "error",
        on_lost: Literal["error", "drop_row", "as_text"] = "error",
        duplicates: Literal["keep", "drop"] = "keep",
        template_kwargs: Optional[dict[str, Any]] = None,
        ignore_index: int = -100,
        seed: int = 42,
        num_workers: int = 4,
    ) -> None:
        if val_split_fraction is not None and not 0 <= val_split_fraction < 1:
            raise UserError(f"--data.val_split_fraction {val_split_fraction} must be at least 0 and below 1.")
        self.mask_prompt, self.train_on = mask_prompt, train_on
        self.val_split_fraction, self.seed = val_split_fraction, seed
        self.prompt_style = prompt_style
        self.too_long, self.on_bad_row, self.on_lost = too_long, on_bad_row, on_lost
        self.duplicates, self.template_kwargs = duplicates, template_kwargs

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
        on_progress: Progress = lambda rows, total: None,
        context: Optional[int] = None,
        details: Optional[Details] = None,
        val_details: Optional[Details] = None,
    ) -> TokenizedDataset:
        """Tokenize the training and validation rows, or load their tokens from the cache.

        Args:
            tokenizer: The checkpoint's tokenizer.
            folder: The checkpoint, for its chat template.
            max_seq_length: Maximum length of a row, in tokens.
            on_progress: Called with the number of rows so far and of all rows, None if unknown. Never called if the
                tokens come from the cache.
            context: The model's context length in tokens, if known.
            details: Filled with what was found in the training rows. All rows are then read, whatever is wrong.
            val_details: The same for separate validation rows.

        Raises:
            UserError: The rows cannot be read or used.
        """
        train_sources, val_sources = self.sources()
        form, opened = self.first_form(train_sources, checks=details is not None)
        plain_text = form == "text" and self.prompt_style == "auto"
        name = "none" if plain_text else self.prompt_style
        style = choose_style(name, folder, chat=form in CHAT_FORMS)
        if self.template_kwargs:
            style = style.with_defaults(self.template_kwargs)
        turn_end = style.turn_end(tokenizer.special_tokens) or tokenizer.eos_token
        mask_prompt = self.mask_prompt
        if self.train_on is not None:
            mask_prompt = self.train_on != "all"
        elif mask_prompt is None:
            mask_prompt = style.own_special_tokens or form in CHAT_FORMS
        below_context = context is None or max_seq_length < context
        maker = TokenMaker(
            data=self,
            tokenizer=tokenizer,
            style=style,
            turn_end=turn_end,
            mask_prompt=mask_prompt,
            max_length=max_seq_length,
            below_context=below_context,
            details=details,
        )
        train, counts, cached = maker.tokens(train_sources, on_progress, opened)
        n_rows = len(train)
        if self.duplicates == "drop":
            train = train.without_duplicates()
        n_duplicates, val_counts = n_rows - len(train), None
        if val_sources is None:
            train, val = self.split(train)
        elif self.val_split_fraction:
            raise UserError(
                f"--data.val_split_fraction {self.val_split_fraction}: the data has separate validation rows. Remove "
                "the option, or pass null if it is from a config."
            )
        else:
            val, val_counts, _ = replace(maker, details=val_details).tokens(val_sources, on_progress)
        return TokenizedDataset(
            train=weighted(train, train_sources, counts, self.seed),
            val=val,
            style=style,
            turn_end=turn_end,
            sources=list(zip(train_sources, counts)),
            val_sources=None if val_sources is None else list(zip(val_sources, val_counts or [])),
            mask_prompt=mask_prompt,
            cached=cached,
            below_context=below_context,
            plain_text=plain_text,
            n_duplicates=n_duplicates,
            unit=self.unit,
        )

    def first_form(self, sources: list[RowSource], checks: bool) -> tuple[str, Rows]:
        """The form of the first usable row, which decides the default style, and the rows of the first source. A check
        skips bad rows, too, and needs no usable row."""
        for number, source in enumerate(sources):
            rows, seen = source.rows(), []
            for where, fields in rows:
                seen.append((where, fields))
                try:
                    adapted = self.fields(source, where, fields)
                    if adapted is not None:
                        form, _ = match(adapted, where, source.form, self.unit == "label" or source.has_labels)
                        return form, itertools.chain(seen, rows) if number == 0 else sources[0].rows()
                except UserError as e:
                    if self.on_bad_row == "error" and not checks:
                        raise with_remedy(e) from e
        if checks:
            return "alpaca", sources[0].rows()
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


def weighted(rows: TokenizedRows, sources: list[RowSource], counts: list[Counts], seed: int) -> TokenizedRows:
    """The rows of each source, repeated by its weight. A fraction of a weight takes a random share of the rows.

    Every source keeps at least one row.
    """
    if all(s.weight == 1 for s in sources):
        return rows
    ends = torch.tensor([c.kept for c in counts]).cumsum(0)
    of = torch.bucketize(rows.index, ends, right=True)
    chosen = []
    for number, source in enumerate(sources):
        own = (of == number).nonzero().squeeze(1)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        chosen += [own] * int(source.weight)
        n_more = round(source.weight % 1 * len(own)) or int(source.weight < 1)
        chosen.append(own[order[:n_more].sort().values])
    return rows.subset(torch.cat(chosen))
