"""Where rows come from: files, and data sets on the Hugging Face hub."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Optional, Union

from litgpt.data.forms import FORMS, SHARED, rename
from litgpt.data.row_files import Rows, read_rows, without_padding
from litgpt.errors import UserError, require

LINES = (".jsonl", ".ndjson", ".csv", ".tsv")  # files with a row in most lines


@dataclass(frozen=True)
class RowSource:
    """Where rows come from.

    Args:
        path: A file, or `hf:ORG/NAME` or `hf:ORG/NAME:SPLIT` for a data set on the Hugging Face hub.
        weight: How often its rows are seen in an epoch. A fraction takes that share of the rows.
        columns: Maps litgpt's columns to those of the file.
        form: The form of the rows. If None, it is recognized.
        inherits: `columns` and `form` are those of other files, and apply only if the first row has such columns.
        limit: Read only the first rows, or with a fraction that share of them, spread evenly. If None, all of them.
    """

    path: Union[Path, str]
    weight: float = 1.0
    columns: Optional[Mapping[str, str]] = None
    form: Optional[str] = None
    inherits: bool = False
    limit: Optional[Union[int, float]] = None

    @property
    def has_labels(self) -> bool:
        """Whether the user said which column says how good an answer is."""
        return "label" in (self.columns or {})

    def rows(self) -> Rows:
        """The position and the value of each row. Raises `UserError` if the file cannot be read."""
        rows = self.all_rows()
        if isinstance(self.limit, int):
            yield from itertools.islice(rows, self.limit)
        elif self.limit is not None:
            yield from (row for i, row in enumerate(rows) if int((i + 1) * self.limit) > int(i * self.limit))
        else:
            yield from rows

    def all_rows(self) -> Rows:
        if not str(self.path).startswith("hf:"):
            return read_rows(Path(self.path))
        rows = hub_data_set(str(self.path))
        return ((f"{self.path}, row {i + 1}", without_padding(fields)) for i, fields in enumerate(rows))

    def fitted(self, rows: Rows) -> tuple["RowSource", Rows]:
        """The source with only those inherited options that fit its first row, and the rows."""
        if not self.inherits:
            return self, rows
        seen: list[tuple[str, Any]] = []
        for where, fields in rows:
            seen.append((where, fields))
            if isinstance(fields, dict):
                needed = {theirs for ours, theirs in (self.columns or {}).items() if ours not in SHARED}
                columns = self.columns if needed <= fields.keys() else None
                known = rename(fields, columns, where) if columns else fields
                form = self.form if self.form in FORMS and not FORMS[self.form].lacking(known) else None
                return replace(self, columns=columns, form=form), itertools.chain(seen, rows)
        return self, iter(seen)

    def fingerprint(self) -> tuple[str, int]:
        """A hash of the rows when it was first asked for, and about how many there are: 0 if that is not known."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> tuple[str, int]:
        if str(self.path).startswith("hf:"):
            rows = hub_data_set(str(self.path))
            return str(rows._fingerprint), len(rows)
        digest, n_lines = hashlib.sha256(), 0
        with open(self.path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
                n_lines += chunk.count(b"\n")
        n_rows = n_lines if Path(self.path).suffix.lower() in LINES else 0
        if isinstance(self.limit, int):
            n_rows = min(n_rows, self.limit)
        return digest.hexdigest(), int(n_rows * self.limit) if isinstance(self.limit, float) else n_rows


@lru_cache
def hub_data_set(path: str) -> Any:
    """The rows of `hf:ORG/NAME` or `hf:ORG/NAME:SPLIT`, memory-mapped by the `datasets` package."""
    name, _, split = path.removeprefix("hf:").partition(":")
    try:
        return require("datasets", "data").load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"Cannot load the data set {name!r}: {e}") from e


@dataclass(frozen=True)
class TextPiece:
    """A piece of a document. `first` and `last` mark its ends."""

    text: str
    first: bool
    last: bool
