"""Token ids of many rows, in a safetensors file that is written in a stream and read by memory map.

The file holds `ids` (int32) and `loss_mask` (uint8) of all rows end to end, `starts` (int64) with the start of each row
and the end of the last one, `hashes` (int64) to find equal rows, and the counts as metadata.
"""

import hashlib
import json
import os
import shutil
import struct
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from safetensors import SafetensorError, safe_open

from litgpt.data.batches import UNTRAINED, Batch
from litgpt.errors import UserError
from litgpt.storage.files import parse_json, part_of

DTYPES = {"ids": ("I32", 4), "loss_mask": ("U8", 1), "starts": ("I64", 8), "hashes": ("I64", 8)}  # and bytes
# bits of the loss mask: the token is a target; it is part of an answer; its sequence has a rejected answer
IN_LOSS, ANSWER, REJECTED = 1, 2, 4


@dataclass
class Counts:
    """What happened to the rows of a source.

    Args:
        rows: Rows that were read.
        kept: Rows that can be trained on.
        tokens: Tokens of these rows.
        truncated: Rows over the length limit that were truncated.
        too_long: Rows over the length limit that were dropped.
        no_targets: Rows dropped because they have no target token.
        identical: Pairs dropped because both answers are the same.
        bad: Rows skipped because they cannot be used.
        skipped: Rows skipped because their label is false, or because no two of their answers have different scores.
        dropped_lost: Rows dropped because the prompt style does not show all of their parts.
        as_text: Rows with parts that were moved into texts because the prompt style does not show them.
        no_stop: Rows without a stop token among their targets; of pairs, those with such an answer.
        two_bos: Rows that start with two BOS tokens.
        other_prompts: Pairs whose answers follow different prompts.
        short_prompts: Rows whose prompts together have fewer than three letters or digits.
        lost: Rows with parts that the prompt style does not show, by the kind of part.
        lost_at: The position of the first of these rows.
        forms: Rows of each form.
        ignored: Rows with a column or a message field that is not used, by its name.
        columns: Columns that were recognized by a similar name: litgpt's names and those of the file.
        mapped: Rows with a column that `--data.columns` maps, by its name in the file.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    truncated: int = 0
    too_long: int = 0
    no_targets: int = 0
    identical: int = 0
    bad: int = 0
    skipped: int = 0
    dropped_lost: int = 0
    as_text: int = 0
    no_stop: int = 0
    two_bos: int = 0
    other_prompts: int = 0
    short_prompts: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    lost_at: dict[str, str] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    mapped: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "Counts") -> "Counts":
        """Numbers are added; of positions and names the first one stays."""
        total = Counts()
        for name, value in vars(self).items():
            more = getattr(other, name)
            if isinstance(value, int):
                setattr(total, name, value + more)
            else:
                entries = dict(value)
                for key, inner in more.items():
                    entries[key] = inner if key not in entries else add_or_keep(entries[key], inner)
                setattr(total, name, entries)
        return total

    def add_row(self, row: "Counts") -> None:
        """Add the counts of a row, each as 1."""
        for name, value in vars(row).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + bool(value))
                continue
            entries = getattr(self, name)
            for key, inner in value.items():
                entries[key] = entries.get(key, 0) + 1 if isinstance(inner, int) else entries.get(key, inner)


def add_or_keep(first: Any, second: Any) -> Any:
    return first + second if isinstance(first, int) else first


@dataclass
class Finding:
    """Something about a row that `litgpt data check` lists.

    Args:
        kind: `bad`, `truncated`, `lost`, or `identical`.
        where: The position of the row.
        reason: In words.
    """

    kind: str
    where: str
    reason: str


@dataclass
class TokenChunk:
    """Some rows on their way to the file.

    Args:
        ids: Token ids of all rows, end to end.
        loss_mask: As in the file.
        lengths: Tokens of each row.
        hashes: A hash of the ids of each row.
        counts: What happened to the rows that were read.
        detailed: Whether to keep what follows.
        findings: Remarkable rows.
        positions: The position of each row.
        full_lengths: Tokens of each row, also of those that are too long, before it was truncated.
        error: The first row that cannot be used, unless such rows are skipped.
    """

    ids: array = field(default_factory=lambda: array("i"))
    loss_mask: bytearray = field(default_factory=bytearray)
    lengths: array = field(default_factory=lambda: array("q"))
    hashes: array = field(default_factory=lambda: array("q"))
    counts: Counts = field(default_factory=Counts)
    detailed: bool = False
    findings: list[Finding] = field(default_factory=list)
    positions: list[str] = field(default_factory=list)
    full_lengths: list[int] = field(default_factory=list)
    error: Optional[UserError] = None

    def add(self, ids: Sequence[int], loss_mask: bytes, where: str = "") -> None:
        """Add a row. Raises `UserError` if an id does not fit into the file."""
        try:
            row = array("i", ids)
        except OverflowError as e:
            raise UserError(f"The tokenizer has a token with id {max(ids)}, which is too large.") from e
        self.ids += row
        self.loss_mask += loss_mask
        self.lengths.append(len(row))
        digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
        self.hashes.append(struct.unpack("<q", digest)[0])
        self.counts.kept += 1
        self.counts.tokens += len(row)
        if self.detailed:
            self.positions.append(where)

    def note(self, kind: str, where: str, reason: str) -> None:
        if self.detailed:
            self.findings.append(Finding(kind, where, reason))

    def measure(self, n_tokens: int) -> None:
        if self.detailed:
            self.full_lengths.append(n_tokens)


class TokenizedRows:
    """Token ids of many rows, end to end in flat tensors.

    Args:
        ids: int32, all tokens.
        loss_mask: uint8, the bits `IN_LOSS` and `ANSWER` of each token.
        starts: int64, the start of each stored row, and the end of the last one.
        hashes: int64, one for each stored row. Equal rows have equal hashes.
        index: int64, the stored rows to use, in order. Default: all.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        loss_mask: torch.Tensor,
        starts: torch.Tensor,
        hashes: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> None:
        self.ids, self.loss_mask, self.starts, self.hashes = ids, loss_mask, starts, hashes
        self.index = torch.arange(len(starts) - 1) if index is None else index
        self.lengths = starts.diff()[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, rows: torch.Tensor) -> "TokenizedRows":
        """These rows, by number. The tokens are shared."""
        return TokenizedRows(self.ids, self.loss_mask, self.starts, self.hashes, self.index[rows])

    def without_duplicates(self) -> "TokenizedRows":
        """The rows that are not equal to an earlier one."""
        return self.subset((self.first_equal() == torch.arange(len(self))).nonzero().squeeze(1))

    def first_equal(self) -> torch.Tensor:
        """For each row the number of the first row that is equal to it: int64."""
        hashes = self.row_hashes()
        order = hashes.argsort(stable=True)
        _, group = hashes[order].unique_consecutive(return_inverse=True)
        starts = torch.cat([torch.ones(1, dtype=torch.bool), group.diff() > 0])[: len(order)].nonzero().squeeze(1)
        first = torch.empty_like(order)
        first[order] = order[starts][group]
        return first

    def unweighted(self) -> "TokenizedRows":
        """Each row once, in the order of the file."""
        return TokenizedRows(self.ids, self.loss_mask, self.starts, self.hashes, self.index.unique())

    def stored(self) -> "TokenizedRows":
        """All rows of the file, also those of other sets."""
        return TokenizedRows(self.ids, self.loss_mask, self.starts, self.hashes)

    def row(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss mask of row `i`."""
        stored = int(self.index[i])
        tokens = slice(int(self.starts[stored]), int(self.starts[stored + 1]))
        return self.ids[tokens], self.loss_mask[tokens]

    def sequences(self, i: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and loss mask of each sequence of row `i`: two of a pair, whose second one is rejected, else one."""
        ids, mask = self.row(i)
        first = len(ids) - int((mask & REJECTED).bool().sum())
        if first in (0, len(ids)):
            return [(ids, mask)]
        return [(ids[:first], mask[:first]), (ids[first:], mask[first:])]

    def is_rejected(self) -> torch.Tensor:
        """Whether the last answer of each row is a rejected or undesirable one: bool."""
        return (self.loss_mask[self.starts[1:] - 1] & REJECTED).bool()[self.index]

    def row_hashes(self) -> torch.Tensor:
        return self.hashes[self.index]

    def trained_share(self) -> float:
        """The fraction of the tokens that are targets."""
        n_targets = self.count(self.loss_mask & IN_LOSS)
        return int(n_targets.sum()) / max(1, int(self.lengths.sum()))

    def answer_lengths(self, rejected: bool) -> torch.Tensor:
        """The target tokens of the chosen or of the rejected answer of each row that has one: int32."""
        bits = IN_LOSS | ANSWER | (REJECTED if rejected else 0)
        n_tokens = self.count((self.loss_mask & (IN_LOSS | ANSWER | REJECTED)) == bits)
        return n_tokens[n_tokens > 0]

    def count(self, selected: torch.Tensor) -> torch.Tensor:
        """The selected tokens of each row: int32. `selected` has 0 or 1 for each stored token."""
        before = torch.zeros(len(selected) + 1, dtype=torch.int32)
        torch.cumsum(selected, 0, dtype=torch.int32, out=before[1:])
        return (before[self.starts[1:]] - before[self.starts[:-1]])[self.index]

    def prompt(self, i: int) -> list[int]:
        """The ids before the last answer of row `i`, the chosen one of a pair."""
        ids, mask = self.sequences(i)[0]
        end = len(ids)
        while end and not mask[end - 1] & ANSWER:
            end -= 1
        while end and mask[end - 1] & ANSWER:
            end -= 1
        return ids[:end].tolist()

    def answer(self, i: int) -> list[int]:
        """The ids of the last answer of row `i`, the chosen one of a pair, including its stop token."""
        ids, mask = self.sequences(i)[0]
        start = len(self.prompt(i))
        return ids[start:][(mask[start:] & ANSWER).bool()].tolist()

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows, end to end. Without rows: one row without targets, for a rank that has no share of a step."""
        ids, targets = [], []
        for i in rows or [0]:
            row, mask = self.row(i)
            row = row.long()
            target = torch.full_like(row, UNTRAINED)
            if rows:
                target[:-1] = torch.where((mask[1:] & IN_LOSS).bool(), row[1:], UNTRAINED)
            ids.append(row)
            targets.append(target)
        flat = torch.cat(targets)
        return Batch(torch.cat(ids)[None], flat[None], [len(i) for i in ids], int((flat != UNTRAINED).sum()))

    def longest(self, n: int) -> list[int]:
        return self.lengths.argsort(descending=True, stable=True)[:n].tolist()


class Details:
    """What `litgpt data check` shows of single rows.

    Attributes:
        findings: Remarkable rows with their sources, in order.
        positions: The position of each row that was kept.
        lengths: Tokens of each row, also of those that are too long, before it was truncated.
    """

    def __init__(self) -> None:
        self.findings: list[tuple[Any, Finding]] = []
        self.positions: list[str] = []
        self.lengths = array("q")

    def add(self, source: Any, chunk: TokenChunk) -> None:
        self.findings += ((source, finding) for finding in chunk.findings)
        self.positions += chunk.positions
        self.lengths.extend(chunk.full_lengths)


class TokenWriter:
    """Writes rows chunk by chunk. Only their starts and hashes stay in memory.

    Args:
        target: The file. It appears, complete, when `close` returns.

    Attributes:
        counts: What happened to the rows of each source, written along with them.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, BinaryIO] = {name: self.part() for name in ("ids", "loss_mask")}
        self.starts, self.hashes = array("q", [0]), array("q")
        self.counts: list[Counts] = []

    def part(self) -> Any:
        return tempfile.TemporaryFile(dir=self.target.parent)

    def add(self, chunk: TokenChunk) -> None:
        """Write the rows of a chunk, and add what happened to them to the counts of the last source."""
        self.parts["ids"].write(chunk.ids.tobytes())
        self.parts["loss_mask"].write(chunk.loss_mask)
        self.starts.extend(list(accumulate(chunk.lengths, initial=self.starts[-1]))[1:])
        self.hashes += chunk.hashes
        self.counts[-1] += chunk.counts

    def close(self) -> None:
        """Write the file: the safetensors header, then the parts."""
        for name in ("starts", "hashes"):
            self.parts[name] = self.part()
            self.parts[name].write(getattr(self, name).tobytes())
        order = sorted(DTYPES, key=lambda name: -DTYPES[name][1])  # largest elements first, so that all are aligned
        header: dict[str, Any] = {"__metadata__": {"counts": json.dumps([vars(c) for c in self.counts])}}
        at = 0
        for name in order:
            dtype, size = DTYPES[name]
            n_bytes = self.parts[name].tell()
            header[name] = {"dtype": dtype, "shape": [n_bytes // size], "data_offsets": [at, at + n_bytes]}
            at += n_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        part = part_of(self.target.with_name("tokens"))
        with open(part, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                self.parts[name].seek(0)
                shutil.copyfileobj(self.parts[name], f)
            f.flush()
            os.fsync(f.fileno())
        self.discard()
        os.replace(part, self.target)

    def discard(self) -> None:
        for part in self.parts.values():
            part.close()


def read_tokens(file: Path) -> tuple[TokenizedRows, list[Counts]]:
    """Open a token file by memory map: the rows, and what happened to the rows of each source."""
    with safe_open(str(file), framework="pt") as f:
        counts = json.loads(f.metadata()["counts"])
        rows = TokenizedRows(*(f.get_tensor(name) for name in DTYPES))
    return rows, [Counts(**c) for c in counts]


def cached_tokens(file: Path, is_used: bool = True) -> Optional[tuple[TokenizedRows, list[Counts]]]:
    """The tokens that an earlier run left in `file`, or None if there is no such file or it cannot be read."""
    try:
        with safe_open(str(file), framework="pt") as f:
            dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
            counts = parse_json((f.metadata() or {}).get("counts", "null"))
        if is_used:
            os.utime(file)  # the cache removes what was not used for the longest time
    except (OSError, SafetensorError, ValueError):
        return None
    names = vars(Counts()).keys()
    known = isinstance(counts, list) and all(isinstance(c, dict) and c.keys() == names for c in counts)
    return read_tokens(file) if known and dtypes == {name: dtype for name, (dtype, _) in DTYPES.items()} else None
