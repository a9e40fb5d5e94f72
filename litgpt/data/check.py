"""What is wrong with the data of a run, as far as a machine can see it."""

from collections import Counter
from dataclasses import dataclass

import torch

from litgpt.data.base import TokenizedDataset
from litgpt.data.lost import EARLIER
from litgpt.data.tokens import Counts, TokenizedRows
from litgpt.errors import UserError


@dataclass
class Duplicates:
    """Rows that are equal to an earlier one: in each set, and validation rows that are trained on too."""

    train: int
    val: int
    across: int


def duplicates(loaded: TokenizedDataset) -> Duplicates:
    train, val = loaded.train.row_hashes(), loaded.val.row_hashes()
    return Duplicates(
        train=len(train) - len(train.unique()),
        val=len(val) - len(val.unique()),
        across=int(torch.isin(val, train).sum()),
    )


def check_ids(loaded: TokenizedDataset, known: int) -> None:
    """Raise `UserError` where rows have tokens that the model does not know.

    Args:
        known: The tokens that it knows.
    """
    highest = max((int(rows.ids.max()) for rows in (loaded.train, loaded.val) if len(rows.ids)), default=0)
    if highest >= known:
        raise UserError(
            f"The rows have the token {highest}, the model only knows those below {known}: the tokenizer belongs to "
            "another model."
        )


def data_problems(loaded: TokenizedDataset) -> list[str]:
    """What would spoil the run, each with its remedy. Cheap: it reads counts and hashes, no tokens."""
    found = []
    counts = [loaded.counts, *([loaded.val_counts] if loaded.val_counts else [])]
    if not len(loaded.train):
        found.append(nothing_left(loaded.counts))
    empty = [path for path, n in loaded.files.items() if not n]
    if len(loaded.train) and empty:
        found.append(f"No row of {', '.join(empty)} can be used: see --data.columns and --data.format.")
    lost: Counter[str] = sum((Counter(c.lost) for c in counts), Counter())
    for kind, n in sorted(lost.items()):
        where = next(c.lost_at[kind] for c in counts if kind in c.lost_at)
        if kind != EARLIER:
            found.append(
                f"{n:,} rows have {kind} that the prompt style {loaded.style.name} does not show (the first: {where}). "
                "Choose another --data.prompt_style, such as chatml, or remove them from the rows."
            )
    if len(loaded.train) and loaded.counts.no_stop == stored(loaded.counts):
        remedy = "choose another --data.prompt_style"
        if loaded.counts.cut:
            longer = "raise --train.max_seq_length" if loaded.longer else "shorten them"
            remedy = f"{loaded.counts.cut:,} rows are cut, so {longer}, or {remedy}"
        found.append(f"No row trains a stop token, so the model would never end an answer: {remedy}.")
    if sum(c.two_bos for c in counts):
        found.append(
            f"{sum(c.two_bos for c in counts):,} rows begin with two BOS: take one out of the rows or the template."
        )
    if loaded.separate and (across := duplicates(loaded).across):
        found.append(
            f"{across:,} of {len(loaded.val):,} validation rows are also trained on, so that the validation loss says "
            "nothing: take them out of one of the files."
        )
    return found


def nothing_left(counts: Counts) -> str:
    reasons = {
        "without a trained token within --train.max_seq_length": counts.untrained,
        "too long": counts.too_long,
        "unusable": counts.bad,
        "left out by their label": counts.left_out,
    }
    said = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items() if n)
    return f"No row is left to train on: of {counts.rows:,} rows are {said or 'none kept'}."


def stored(counts: Counts) -> int:
    return sum(counts.sources)


def histogram(rows: TokenizedRows, buckets: int = 10) -> list[tuple[int, int, int]]:
    """Rows by their length in tokens: (from, to, rows), in steps of equal width."""
    if not len(rows):
        return []
    width = max(1, -(-int(rows.lengths.max()) // buckets))
    numbers = ((rows.lengths - 1) // width).bincount(minlength=1).tolist()
    return [(i * width + 1, (i + 1) * width, n) for i, n in enumerate(numbers)]
