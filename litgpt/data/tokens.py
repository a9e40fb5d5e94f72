"""Token ids of many rows, in a safetensors file that is written in a stream and read by memory map.

The file holds `ids` (int32) and `loss_mask` (uint8) of all rows end to end, `starts` (int64) with the start of each row
and the end of the last one, `hashes` (int64) to find equal rows, and the counts as metadata.
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
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from safetensors import SafetensorError, safe_open

from litgpt.data.batches import UNTRAINED, Batch
from litgpt.errors import UserError
from litgpt.storage.files import cache_place, parse_json, part_of

DTYPES = {"ids": ("I32", 4), "loss_mask": ("U8", 1), "starts": ("I64", 8), "hashes": ("I64", 8)}  # and bytes
IN_LOSS, ANSWER = 1, 2  # bits of the loss mask: the token is a target; it is part of an answer


@dataclass
class Counts:
    """What happened to the rows that were read.

    Args:
        rows: Rows that were read.
        truncated: Rows over the length limit that were truncated.
        too_long: Rows over the length limit that were dropped.
        no_targets: Rows dropped because they have no target token.
        bad: Rows skipped because they cannot be used.
        skipped: Rows skipped because their label is false.
        no_stop: Rows without a stop token among their targets.
        two_bos: Rows that start with two BOS tokens.
        lost: Rows with parts that the prompt style does not show, by the kind of part.
        lost_at: The position of the first of these rows.
        forms: Rows of each form.
        sources: Rows kept from each source.
    """

    rows: int = 0
    truncated: int = 0
    too_long: int = 0
    no_targets: int = 0
    bad: int = 0
    skipped: int = 0
    no_stop: int = 0
    two_bos: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    lost_at: dict[str, str] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    sources: list[int] = field(default_factory=list)


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

    def row(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss mask of row `i`."""
        stored = int(self.index[i])
        tokens = slice(int(self.starts[stored]), int(self.starts[stored + 1]))
        return self.ids[tokens], self.loss_mask[tokens]

    def row_hashes(self) -> torch.Tensor:
        return self.hashes[self.index]

    def trained_share(self) -> float:
        """The fraction of the tokens that are targets."""
        n_targets = sum(int((self.row(i)[1] & IN_LOSS).sum()) for i in range(len(self)))
        return n_targets / max(1, int(self.lengths.sum()))

    def prompt(self, i: int) -> list[int]:
        """The ids before the last answer of row `i`."""
        ids, mask = self.row(i)
        end = len(ids)
        while end and not mask[end - 1] & ANSWER:
            end -= 1
        while end and mask[end - 1] & ANSWER:
            end -= 1
        return ids[:end].tolist()

    def answer(self, i: int) -> list[int]:
        """The ids of the last answer of row `i`, including its stop token."""
        ids, mask = self.row(i)
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


class TokenWriter:
    """Writes rows one by one. Only their starts and hashes stay in memory.

    Args:
        target: The file. It appears, complete, when `close` returns.

    Attributes:
        counts: What happened to the rows, written along with them.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, BinaryIO] = {name: self.part() for name in ("ids", "loss_mask")}
        self.starts, self.hashes = array("q", [0]), array("q")
        self.counts = Counts()

    def part(self) -> Any:
        return tempfile.TemporaryFile(dir=self.target.parent)

    def add(self, ids: Sequence[int], loss_mask: bytes) -> None:
        try:
            id_bytes = array("i", ids).tobytes()
        except OverflowError as e:
            raise UserError(f"The tokenizer has a token with id {max(ids)}, which is too large.") from e
        self.parts["ids"].write(id_bytes)
        self.parts["loss_mask"].write(loss_mask)
        self.starts.append(self.starts[-1] + len(loss_mask))
        digest = hashlib.blake2b(id_bytes, digest_size=8).digest()
        self.hashes.append(struct.unpack("<q", digest)[0])

    def close(self) -> None:
        """Write the file: the safetensors header, then the parts."""
        for name in ("starts", "hashes"):
            self.parts[name] = self.part()
            self.parts[name].write(getattr(self, name).tobytes())
        order = sorted(DTYPES, key=lambda name: -DTYPES[name][1])  # largest elements first, so that all are aligned
        header: dict[str, Any] = {"__metadata__": {"counts": json.dumps(vars(self.counts))}}
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


def read_tokens(file: Path) -> tuple[TokenizedRows, Counts]:
    """Open a token file by memory map."""
    with safe_open(str(file), framework="pt") as f:
        counts = json.loads(f.metadata()["counts"])
        rows = TokenizedRows(*(f.get_tensor(name) for name in DTYPES))
    return rows, Counts(**counts)


def cached_tokens(file: Path) -> Optional[tuple[TokenizedRows, Counts]]:
    """The tokens that an earlier run left in `file`, or None if there is no such file or it cannot be read."""
    try:
        with safe_open(str(file), framework="pt") as f:
            dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
            counts = parse_json((f.metadata() or {}).get("counts", "null"))
    except (OSError, SafetensorError, ValueError):
        return None
    known = isinstance(counts, dict) and counts.keys() == vars(Counts()).keys()
    return read_tokens(file) if known and dtypes == {name: dtype for name, (dtype, _) in DTYPES.items()} else None


def cache_folder() -> Path:
    """The folder of token files, in `LITGPT_CACHE` or `~/.cache/litgpt`; temporary if that is not writable."""
    place = cache_place()
    if place is not None:
        folder = place / "tokens"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return temporary_cache()


@cache
def temporary_cache() -> Path:
    folder = tempfile.mkdtemp(prefix="litgpt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
