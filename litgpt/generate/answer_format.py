"""The formats of a file of answers: an object per line (JSONL), or a table with a header (CSV, TSV)."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

from litgpt.data.row_files import LINE, endings
from litgpt.errors import UserError
from litgpt.storage.files import whole_number

OUTPUT_KEYS = ("answer", "answers", "finish_reason", "finish_reasons", "error")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson", ".json", "")


class JSONLines:
    header = ""

    def record(self, fields: dict[str, Any]) -> str:
        return to_line(fields)

    def beginning(self, fields: dict[str, Any]) -> str:
        """The record of a row up to its answer."""
        return to_line(fields).rstrip("}\n")

    @staticmethod
    def records(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        """Each record, and whether it is complete."""
        return ((line, line.endswith(b"\n")) for line in file)

    def parse(self, record: bytes) -> Optional[dict[str, Any]]:
        """The fields of a record, or None if it is something else."""
        try:
            saved = json.loads(record, parse_constant=str, parse_int=whole_number)
        except (ValueError, RecursionError):
            return None
        return saved if isinstance(saved, dict) and not saved.keys().isdisjoint(OUTPUT_KEYS) else None

    def same_row(self, saved: dict[str, Any], fields: dict[str, Any]) -> bool:
        """Whether a record answers the row with these fields."""
        expected = json.loads(to_line(fields), parse_constant=str)
        return {**saved, **expected} == saved


class Table:
    """CSV or TSV. Values that are not text are JSON, and null is an empty cell.

    Args:
        columns: Those of the prompts.
        several: Whether each row gets several answers.
    """

    def __init__(self, columns: Sequence[str], several: bool, delimiter: str) -> None:
        csv.field_size_limit(LINE)
        self.given, self.delimiter = list(columns), delimiter
        self.names = [*columns, *(("answers", "finish_reasons") if several else ("answer", "finish_reason")), "error"]
        self.header = self.line(self.names)

    def record(self, fields: dict[str, Any]) -> str:
        return self.line([as_cell(fields.get(name)) for name in self.names])

    def beginning(self, fields: dict[str, Any]) -> str:
        cells = [as_cell(fields.get(name)) for name in self.given]
        return self.line([*cells, ""]).removesuffix("\n") if cells else ""

    def line(self, cells: Sequence[str]) -> str:
        text = io.StringIO()
        # with another end, cells that contain \r would have no quotes
        csv.writer(text, delimiter=self.delimiter, lineterminator="\r\n").writerow(cells)
        return text.getvalue().removesuffix("\r\n") + "\n"

    @staticmethod
    def records(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        """Each record, and whether it is complete. A line break between quotes does not end a record."""
        record = b""
        for line in file:
            record += line
            if record.count(b'"') % 2 == 0 and record.endswith(b"\n"):
                yield record, True
                record = b""
        if record:
            yield record, False

    def parse(self, record: bytes) -> Optional[dict[str, Any]]:
        try:
            text = io.StringIO(record.decode().removesuffix("\n"), newline="")
            (cells,) = csv.reader(text, delimiter=self.delimiter, strict=True)
            saved: dict[str, Any] = dict(zip(self.names, cells, strict=True))
            if not saved["error"]:
                del saved["error"]
            elif "answers" in saved:
                del saved["answers"]
            return saved | ({"answers": json.loads(saved["answers"])} if "answers" in saved else {})
        except (csv.Error, ValueError):
            return None

    def same_row(self, saved: dict[str, Any], fields: dict[str, Any]) -> bool:
        return all(saved[name] == as_cell(fields.get(name)) for name in self.given)


AnswerFormat = Union[JSONLines, Table]


def answer_format(out: Optional[Path], columns: Sequence[str], several: bool) -> AnswerFormat:
    """The format by the extension of a file, JSONL for stdout. Raises `UserError` if the extension is unknown."""
    extension, compression = endings(out) if out is not None else ("", "")
    if extension in DELIMITERS and not compression:
        return Table(columns, several, DELIMITERS[extension])
    if extension not in LINES or compression:
        known = ", ".join((*DELIMITERS, *LINES)).removesuffix(", ")
        raise UserError(f"--out {out} has an unknown extension. Expected one of {known}.")
    return JSONLines()


def to_line(fields: dict[str, Any]) -> str:
    line = json.dumps(fields, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        line = json.dumps(fields, default=str)
    return line + "\n"


def as_cell(value: Any) -> str:
    if value is None:
        return ""
    is_json = isinstance(value, (bool, int, float, list, dict))
    text = json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
