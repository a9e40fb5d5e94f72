"""Token ids of many rows: written to a file as they are made, read from it by memory map.

The file is a safetensors file, so that reading it needs nothing of ours: `ids` (int32) and `marks` (uint8) of all rows
end to end, `starts` (int64) where each row begins and the last one ends, `hashes` (int64) to find equal rows, and the
counts of what happened on the way as metadata.
"""

import atexit
import hashlib
import json
import os
import shutil
import struct
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from safetensors import SafetensorError, safe_open

from litgpt.data.batches import UNTRAINED, Batch
from litgpt.errors import UserError
from litgpt.storage.files import cache_place, parse_json, part_of

KINDS = {"ids": ("I32", 4), "marks": ("U8", 1), "starts": ("I64", 8), "hashes": ("I64", 8)}  # dtype and its bytes
TRAINED, ANSWER = 1, 2  # bits of a token's mark: its prediction is trained; it is part of an answer


@dataclass
class Counts:
    """What became of the rows that were read.

    Args:
        rows: Rows that were read.
        cut: Longer than allowed, and cut: they lose their end.
        too_long: Longer than allowed, and dropped.
        untrained: Left out because no token of them is trained.
        bad: Unusable, and skipped.
        left_out: Left out by their own label.
        no_stop: Their last trained token is no stop token.
        two_bos: They begin with two BOS.
        lost: For kinds of parts that the prompt style does not show, the rows that have such a part.
        lost_at: Where the first of these rows stands.
        forms: How many of each form.
        sources: How many rows each source has left.
    """

    rows: int = 0
    cut: int = 0
    too_long: int = 0
    untrained: int = 0
    bad: int = 0
    left_out: int = 0
    no_stop: int = 0
    two_bos: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    lost_at: dict[str, str] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    sources: list[int] = field(default_factory=list)


class TokenizedRows:
    """The token ids of many rows, end to end in flat tensors.

    Args:
        ids: int32, all tokens.
        marks: uint8, `TRAINED` and `ANSWER` for each.
        starts: int64, where each stored row begins, and the end of the last.
        hashes: int64, one for each stored row; equal rows have equal ones.
        index: int64, which of the stored rows these are, in order; all by default.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        marks: torch.Tensor,
        starts: torch.Tensor,
        hashes: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> None:
        self.ids, self.marks, self.starts, self.hashes = ids, marks, starts, hashes
        self.index = torch.arange(len(starts) - 1) if index is None else index
        self.lengths = starts.diff()[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, rows: torch.Tensor) -> "TokenizedRows":
        """Those rows, by their numbers here; the tokens are shared."""
        return TokenizedRows(self.ids, self.marks, self.starts, self.hashes, self.index[rows])

    def row(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and marks of row `i`."""
        stored = int(self.index[i])
        where = slice(int(self.starts[stored]), int(self.starts[stored + 1]))
        return self.ids[where], self.marks[where]

    def row_hashes(self) -> torch.Tensor:
        return self.hashes[self.index]

    def trained_share(self) -> float:
        """The share of the tokens that are trained."""
        trained = sum(int((self.row(i)[1] & TRAINED).sum()) for i in range(len(self)))
        return trained / max(1, int(self.lengths.sum()))

    def prompt(self, i: int) -> list[int]:
        """The ids before the last answer of row `i`."""
        ids, marks = self.row(i)
        end = len(ids)
        while end and not marks[end - 1] & ANSWER:
            end -= 1
        while end and marks[end - 1] & ANSWER:
            end -= 1
        return ids[:end].tolist()

    def answer(self, i: int) -> list[int]:
        """The ids of the last answer of row `i`, its stop token included."""
        ids, marks = self.row(i)
        start = len(self.prompt(i))
        return [t for t, mark in zip(ids[start:].tolist(), marks[start:].tolist()) if mark & ANSWER]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers, end to end; for none at all a row of which nothing is trained, so that a rank
        without a share can still take part."""
        ids, targets = [], []
        for i in rows or [0]:
            row, marks = self.row(i)
            row = row.long()
            target = torch.full_like(row, UNTRAINED)
            if rows:
                target[:-1] = torch.where((marks[1:] & TRAINED).bool(), row[1:], UNTRAINED)
            ids.append(row)
            targets.append(target)
        flat = torch.cat(targets)
        return Batch(torch.cat(ids)[None], flat[None], [len(i) for i in ids], int((flat != UNTRAINED).sum()))

    def longest(self, n: int) -> list[int]:
        """The numbers of the `n` longest rows."""
        return self.lengths.argsort(descending=True, stable=True)[:n].tolist()


class TokenWriter:
    """Takes rows one by one; only their places stay in memory.

    Args:
        target: The file to write. It is there, whole, once `close` returned.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, BinaryIO] = {name: self.part() for name in ("ids", "marks")}
        self.starts, self.hashes = array("q", [0]), array("q")

    def part(self) -> Any:
        return tempfile.TemporaryFile(dir=self.target.parent)

    def add(self, ids: Sequence[int], marks: bytes) -> None:
        try:
            packed = array("i", ids).tobytes()
        except OverflowError as e:
            raise UserError(f"The tokenizer gives a token the id {max(ids)}, which no model has.") from e
        self.parts["ids"].write(packed)
        self.parts["marks"].write(marks)
        self.starts.append(self.starts[-1] + len(marks))
        digest = hashlib.blake2b(packed, digest_size=8).digest()
        self.hashes.append(struct.unpack("<q", digest)[0])

    def close(self, counts: Counts) -> None:
        """Write the file: a header as safetensors has it, then the parts."""
        for name in ("starts", "hashes"):
            self.parts[name] = self.part()
            self.parts[name].write(getattr(self, name).tobytes())
        order = sorted(KINDS, key=lambda name: -KINDS[name][1])  # by size of an element, so that each is aligned
        header: dict[str, Any] = {"__metadata__": {"counts": json.dumps(vars(counts))}}
        at = 0
        for name in order:
            kind, size = KINDS[name]
            n_bytes = self.parts[name].tell()
            header[name] = {"dtype": kind, "shape": [n_bytes // size], "data_offsets": [at, at + n_bytes]}
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


def read_tokens(file: Path) -> tuple[TokenizedRows, Counts]:
    """Open a token file by memory map."""
    with safe_open(str(file), framework="pt") as f:
        counts = json.loads(f.metadata()["counts"])
        rows = TokenizedRows(*(f.get_tensor(name) for name in KINDS))
    return rows, Counts(**counts)


def kept_tokens(file: Path) -> Optional[tuple[TokenizedRows, Counts]]:
    """What an earlier run left in `file`; None if there is nothing, or nothing that can be read."""
    try:
        with safe_open(str(file), framework="pt") as f:
            kinds = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
            counts = parse_json((f.metadata() or {}).get("counts", "null"))
    except (OSError, SafetensorError, ValueError):
        return None
    known = isinstance(counts, dict) and counts.keys() == vars(Counts()).keys()
    return read_tokens(file) if known and kinds == {name: kind for name, (kind, _) in KINDS.items()} else None


def cache_folder() -> Path:
    """Where token files are kept: `LITGPT_CACHE`, by default `~/.cache/litgpt`. Where that cannot be written, it is a
    temporary folder of this process."""
    place = cache_place()
    if place is None:
        return temporary_cache()
    folder = place / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return temporary_cache()
    return folder if os.access(folder, os.W_OK) else temporary_cache()


@cache
def temporary_cache() -> Path:
    folder = tempfile.mkdtemp(prefix="litgpt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
