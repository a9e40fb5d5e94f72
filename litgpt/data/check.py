"""Problems with the data of a run."""

from collections import Counter
from dataclasses import dataclass

import torch

from litgpt.data.base import TokenizedDataset
from litgpt.data.lost import EARLIER
from litgpt.data.tokens import Counts, TokenizedRows
from litgpt.errors import UserError


@dataclass
class Duplicates:
    """Rows equal to an earlier one, in each set, and validation rows that are also training rows."""

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


def check_ids(loaded: TokenizedDataset, vocab_size: int) -> None:
    """Raise `UserError` if a token id is not below `vocab_size`."""
    highest = max((int(rows.ids.max()) for rows in (loaded.train, loaded.val) if len(rows.ids)), default=0)
    if highest >= vocab_size:
        raise UserError(
            f"The rows have token id {highest}, but the model's vocabulary has {vocab_size} tokens. Use the model's "
            "tokenizer."
        )


def data_problems(loaded: TokenizedDataset) -> list[str]:
    """Problems that would make the run useless, each with its remedy. Reads counts and hashes only."""
    found = []
    counts = [loaded.counts, *([loaded.val_counts] if loaded.val_counts else [])]
    if not len(loaded.train):
        found.append(nothing_left(loaded.counts))
    empty = [path for path, n in loaded.files.items() if not n]
    if len(loaded.train) and empty:
        found.append(f"No usable rows in {', '.join(empty)}. See --data.columns and --data.format.")
    lost: Counter[str] = sum((Counter(c.lost) for c in counts), Counter())
    for kind, n in sorted(lost.items()):
        where = next(c.lost_at[kind] for c in counts if kind in c.lost_at)
        if kind != EARLIER:
            found.append(
                f"{n:,} rows have {kind} that the prompt style {loaded.style.name} does not show (first: {where}). "
                "Choose another --data.prompt_style, such as chatml, or remove them from the rows."
            )
    if len(loaded.train) and loaded.counts.no_stop == sum(loaded.counts.sources):
        remedy = "Choose another --data.prompt_style."
        if loaded.counts.truncated:
            fix = "Raise --train.max_seq_length" if loaded.below_context else "Shorten the rows"
            remedy = f"{loaded.counts.truncated:,} rows are truncated. {fix}, or choose another --data.prompt_style."
        found.append(f"No row trains a stop token, so the model would never end an answer. {remedy}")
    if n_two_bos := sum(c.two_bos for c in counts):
        found.append(f"{n_two_bos:,} rows start with two BOS tokens. Remove one from the rows or the template.")
    if loaded.val_counts and (across := duplicates(loaded).across):
        found.append(
            f"{across:,} of {len(loaded.val):,} validation rows are also training rows, so the validation loss is too "
            "low. Remove them from one of the files."
        )
    return found


def nothing_left(counts: Counts) -> str:
    reasons = {
        "without a target token within --train.max_seq_length": counts.no_targets,
        "too long": counts.too_long,
        "bad": counts.bad,
        "skipped because of their label": counts.skipped,
    }
    found = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items() if n)
    return f"No rows to train on. Of {counts.rows:,} rows: {found or 'none kept'}."


def histogram(rows: TokenizedRows, buckets: int = 10) -> list[tuple[int, int, int]]:
    """The number of rows by length in tokens: (from, to, rows), in buckets of equal width."""
    if not len(rows):
        return []
    width = max(1, -(-int(rows.lengths.max()) // buckets))
    n_rows = ((rows.lengths - 1) // width).bincount(minlength=1).tolist()
    return [(i * width + 1, (i + 1) * width, n) for i, n in enumerate(n_rows)]
