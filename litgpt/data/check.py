"""Problems with the data of a run."""

from dataclasses import dataclass
from typing import Any

import torch

from litgpt.data.data_module import MAX_SHARED, TokenizedDataset
from litgpt.data.lost import FIELD
from litgpt.data.render import is_lost, with_remedy
from litgpt.data.sources import RowSource
from litgpt.data.tokens import Counts, Finding, TokenizedRows
from litgpt.errors import UserError

MAX_BAD = 0.1  # fraction of the rows of a file


@dataclass
class Duplicates:
    """Rows equal to an earlier one, in each set, and validation rows that are also training rows. Weights, which repeat
    rows on purpose, do not count."""

    train: int
    val: int
    across: int


def duplicates(loaded: TokenizedDataset) -> Duplicates:
    train, val = loaded.train.unweighted().row_hashes(), loaded.val.row_hashes()
    return Duplicates(
        train=len(train) - len(train.unique()),
        val=len(val) - len(val.unique()),
        across=loaded.n_shared,
    )


@dataclass
class AnswerLengths:
    """The target tokens of the answers of a kind.

    Args:
        answers: How many answers there are.
        mean_tokens: Their mean length.
    """

    answers: int
    mean_tokens: float


def answer_lengths(rows: TokenizedRows) -> dict[str, AnswerLengths]:
    """The lengths of chosen or desirable answers, and of rejected or undesirable ones."""
    lengths = {name: rows.answer_lengths(name == "rejected") for name in ("chosen", "rejected")}
    return {
        name: AnswerLengths(len(found), round(int(found.sum()) / max(1, len(found)), 1))
        for name, found in lengths.items()
    }


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
    counts, total = loaded.counts, sum((c for _, c in loaded.all_sources), Counts())
    if not len(loaded.train):
        found.append(nothing_left(counts))
    empty = [str(source.path) for source, c in loaded.all_sources if not c.kept]
    if len(loaded.train) and empty:
        found.append(f"No usable rows in {', '.join(empty)}. See --data.columns and --data.format.")
    for kind, n in sorted(total.lost.items()):
        if is_lost(kind):
            such = "" if kind.startswith(FIELD) or loaded.style.name == "chatml" else ", such as chatml"
            found.append(
                f"{n:,} rows have {kind} that the prompt style {loaded.style.name} does not show (first: "
                f"{total.lost_at[kind]}). Choose another --data.prompt_style{such}, or pass --data.on_lost "
                "as_text or drop_row."
            )
    if len(loaded.train) and counts.kept and counts.no_stop == counts.kept:
        remedy = "Choose another --data.prompt_style."
        if counts.truncated:
            fix = "Raise --train.max_seq_length" if loaded.below_context else "Shorten the rows"
            remedy = f"{counts.truncated:,} rows are truncated. {fix}, or choose another --data.prompt_style."
        found.append(f"No row trains a stop token, so the model would never end an answer. {remedy}")
    if total.two_bos:
        found.append(f"{total.two_bos:,} rows start with two BOS tokens. Remove one from the rows or the template.")
    if loaded.val_sources is not None and (across := loaded.n_shared) > MAX_SHARED * len(loaded.val):
        found.append(
            f"{across:,} of {len(loaded.val):,} validation rows are also training rows, so the validation loss is too "
            "low. Remove them from one of the files."
        )
    return found


def bad_rows(loaded: TokenizedDataset, findings: list[tuple[RowSource, Finding]], skip: bool) -> list[str]:
    """A problem for each file that has rows that cannot be used; with `skip`, only if they exceed `MAX_BAD`."""
    found = []
    for source, counts in loaded.all_sources:
        if counts.bad > (MAX_BAD * counts.rows if skip else 0):
            first = next(f for s, f in findings if s.path == source.path and f.kind == "bad")
            found.append(
                f"{counts.bad:,} of {counts.rows:,} rows of {source.path} cannot be used. The first one: "
                f"{with_remedy(UserError(first.reason))}"
            )
    return found


def nothing_left(counts: Counts) -> str:
    reasons = {
        "without a target token within --train.max_seq_length": counts.no_targets,
        "too long": counts.too_long,
        "bad": counts.bad,
        "skipped because of their label or scores": counts.skipped,
        "dropped because both answers are the same": counts.identical,
        "dropped because the prompt style does not show all of their parts": counts.dropped_lost,
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


def log_histogram(lengths: torch.Tensor) -> list[tuple[int, int, int]]:
    """The number of rows by length in tokens: (from, to, rows). Each bucket is twice as wide as the one before."""
    if not len(lengths):
        return []
    n_rows = torch.log2(lengths.double()).floor().long().bincount().tolist()
    first = next(i for i, n in enumerate(n_rows) if n)
    return [(2**i, 2 ** (i + 1) - 1, n) for i, n in enumerate(n_rows) if i >= first]


def percentiles(lengths: torch.Tensor) -> dict[str, int]:
    """Lengths in tokens that half of the rows, 90%, 99%, and all of them do not exceed."""
    if not len(lengths):
        return {}
    ordered = lengths.sort().values
    at = {name: -(-len(ordered) * share // 100) - 1 for name, share in (("p50", 50), ("p90", 90), ("p99", 99))}
    return {**{name: int(ordered[i]) for name, i in at.items()}, "max": int(ordered[-1])}


def source_table(sources: list[tuple[RowSource, Counts]]) -> list[dict[str, Any]]:
    """What became of the rows of each source."""
    return [
        {
            "file": str(source.path),
            "rows": counts.rows,
            "used": counts.kept,
            "skipped": max(0, counts.rows - counts.kept),
            "truncated": counts.truncated,
            "weight": source.weight,
            "tokens": counts.tokens,
            "forms": counts.forms,
        }
        for source, counts in sources
    ]
