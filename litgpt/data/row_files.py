"""Readers for files of rows: JSON, JSONL, CSV, TSV, and Parquet, compressed or not."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO, Optional, cast

from litgpt.errors import UserError, kind, nearest, require
from litgpt.storage.files import check_depth, parse_json, whole_number

Rows = Iterator[tuple[str, Any]]
Reader = Callable[[Path, BinaryIO], Rows]

LINE = 2**26  # maximum number of bytes in a line
PIECE = 2**22  # bytes of a JSON file that are read at once
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def read_rows(path: Path) -> Rows:
    """Yield the position of each row ("rows.jsonl, line 731"; "rows.json, row 17 (index 16)") and its value.

    The value of a row that cannot be parsed is a `UserError`, so that the caller can skip it. All files but .json are
    streamed.

    Raises:
        UserError: The file cannot be read.
    """
    if not path.is_file():
        raise no_file(path)
    if (extension := endings(path)[0]) not in READERS:
        known, packed = ", ".join(READERS), ", ".join(COMPRESSIONS)
        raise UserError(f"{path} has an unknown extension. Expected {known}, optionally followed by {packed}.")
    any_row = False
    try:
        with open_stream(path) as stream:
            start = stream.peek(2)[:2]
            if not start:
                raise UserError(f"{path} is empty.")
            if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{path} is UTF-16 text. Save the file as UTF-8.")
            for where, value in READERS[extension](path, stream):
                any_row = True
                yield where, value
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        if isinstance(e, OSError) and e.strerror:
            raise UserError(f"Cannot read {path}: {e.strerror}.") from e
        raise UserError(f"{path} cannot be decompressed: {e}. Download or compress the file again.") from e
    if not any_row:
        raise UserError(f"{path} has no rows.")


def endings(path: Path) -> tuple[str, str]:
    """The extension of the format and the extension of the compression, in lowercase."""
    name = Path(path.name.lower())
    compression = name.suffix if name.suffix in COMPRESSIONS else ""
    return (Path(name.stem).suffix if compression else name.suffix), compression


def no_file(path: Path, option: str = "--data.json_path") -> UserError:
    if path.is_dir():
        return UserError(f"{path} is a folder. Expected a file of rows.")
    siblings = path.parent.iterdir() if path.parent.is_dir() else iter(())
    near = [p for p in siblings if endings(p)[0] in READERS and p.exists()]
    hint = nearest(str(path), map(str, near)) if nearest(path.name, [p.name for p in near]) else ""
    return UserError(f"No file {str(path)!r} ({option}).{hint}")


def open_stream(path: Path) -> io.BufferedReader:
    """A stream of the decompressed bytes of a file."""
    compression = endings(path)[1]
    if compression == ".zst":
        return io.BufferedReader(Chunks(unpack_zst(path)))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(compression, open)
    return io.BufferedReader(opener(path, "rb"))


class Chunks(io.RawIOBase):
    """An iterator of bytes as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


def unpack_zst(path: Path) -> Iterator[bytes]:
    """The content of a .zst file. (The package's own reader accepts a truncated file.)"""
    zstandard = require("zstandard", "data")
    frame = None
    with open(path, "rb") as f:
        while data := f.read(1 << 12):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as e:
                    raise EOFError(str(e)) from e
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the last frame is truncated")


def parse_line(line: bytes, path: Path, number: int) -> Any:
    """The value of a line of JSONL, or a `UserError`."""
    where = f"{path}, line {number},"
    try:
        return parse_json(line.decode("utf-8").rstrip("\r\n"))
    except json.JSONDecodeError as e:
        return UserError(f"{where} is not JSON: {e.msg.removesuffix(' at')} at line {number}, column {e.colno}.")
    except UnicodeDecodeError as e:
        return UserError(f"{where} is not UTF-8 text (byte {e.start} of the line). Save the file as UTF-8.")
    except ValueError as e:
        return UserError(f"{where} is JSON that litgpt cannot read: {e}.")


def read_jsonl(path: Path, stream: BinaryIO) -> Rows:
    for number, line in enumerate(lines_of(stream), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        where = f"{path}, line {number}"
        if len(line) > LINE:
            yield where, UserError(f"{where}, has more than {LINE:,} bytes.")
        elif line.strip():
            yield where, parse_line(line, path, number)


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream. A line over the limit is yielded as its first `LINE + 1` bytes."""
    while line := stream.readline(LINE + 1):
        yield line
        while len(line) > LINE and not line.endswith(b"\n"):
            line = stream.readline(LINE + 1)


class JSONText:
    """The text of a JSON file, read piece by piece and parsed value by value.

    Raises:
        UserError: A piece is not UTF-8, or a value is not JSON.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.scan = json.JSONDecoder(parse_int=whole_number).raw_decode
        self.text, self.position = "", 0  # what was read and not yet parsed begins here
        self.n_bytes, self.line, self.column = 0, 1, 1  # of the file before the text

    def read_more(self) -> bool:
        """Read as much as is waiting already, and at least a piece. False at the end of the file."""
        data = self.stream.read(max(PIECE, len(self.text) - self.position))
        try:
            more = self.decode(data, final=not data)
        except UnicodeDecodeError as e:
            start = self.n_bytes + len(data) - len(e.object) + e.start
            raise UserError(f"{self.path} is not UTF-8 text (byte {start}). Save it as UTF-8.") from e
        if not data:
            return False
        self.n_bytes += len(data)
        self.line, self.column = self.place(self.position)
        self.text, self.position = self.text[self.position :] + more, 0
        return True

    def place(self, position: int) -> tuple[int, int]:
        """Line and column in the file."""
        before = self.text[:position]
        last = before.rfind("\n")
        return self.line + before.count("\n"), (position - last if last >= 0 else self.column + position)

    def next(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text) or not self.read_more():
                return self.text[self.position : self.position + 1]

    def value(self) -> Any:
        """The next value, which may need more pieces."""
        while True:
            try:
                value, end = self.scan(self.text, self.position)
            except json.JSONDecodeError as e:
                error = self.error(e.msg, e.pos)
                if len(self.text) - self.position > LINE or not self.read_more():
                    raise error from e
                continue
            except (ValueError, RecursionError) as e:
                raise UserError(f"{self.path} is JSON that litgpt cannot read: {e}.") from e
            if end + 3 <= len(self.text) or not self.read_more():  # a number may go on, as in 1.5e+7
                self.position = end
                return value

    def error(self, message: str, position: int) -> UserError:
        line, column = self.place(position)
        return UserError(f"{self.path} is not JSON: {message.removesuffix(' at')} at line {line}, column {column}.")


def read_json(path: Path, stream: BinaryIO) -> Rows:
    text = JSONText(path, stream)
    first = text.next()
    if not first:
        raise UserError(f"{path} is empty.")
    if first == "[":
        for i, value in enumerate(elements(text)):
            yield json_row(path, i, value)
        return
    values = text.value()
    if text.next():
        with open_stream(path) as again:  # JSONL in a .json file
            first_line = next(lines_of(again), b"").removeprefix(codecs.BOM_UTF8)
            while not first_line.strip():
                first_line = next(lines_of(again))
        if not isinstance(parse_line(first_line, path, 1), dict):
            raise text.error("Extra data", text.position)
        with open_stream(path) as again:
            yield from read_jsonl(path, again)
        return
    if isinstance(values, dict) and len(values) == 1 and isinstance(next(iter(values.values())), list):
        values = next(iter(values.values()))  # {"data": [...]}
    if not isinstance(values, list):
        raise UserError(f"{path} holds {kind(values)}. Expected a list of rows.")
    for i, value in enumerate(values):
        yield json_row(path, i, value)


def elements(text: JSONText) -> Iterator[Any]:
    """The elements of the list that the text is, so that the file may be larger than memory."""
    text.position += 1
    more = text.next() != "]"
    while more:
        text.next()
        yield text.value()
        more = text.next() == ","
        if not more and text.next() != "]":
            raise text.error("Expecting ',' delimiter", text.position)
        text.position += more
    text.position += 1
    if text.next():
        raise text.error("Extra data", text.position)


def json_row(path: Path, i: int, value: Any) -> tuple[str, Any]:
    where = f"{path}, row {i + 1} (index {i})"
    try:
        check_depth(value)
    except ValueError as e:
        value = UserError(f"{where}, is JSON that litgpt cannot read: {e}.")
    return where, value


def read_csv(path: Path, stream: BinaryIO, delimiter: str = ",") -> Rows:
    csv.field_size_limit(LINE)
    # bytes that are not UTF-8 become surrogates, which UTF-8 text cannot contain
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: Optional[list[str]] = None
    while True:
        number = reader.line_num + 1  # the first line of the row; its cells may contain line breaks
        where = f"{path}, line {number}"
        problem = None
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            break
        except csv.Error as e:
            if "unexpected end" in str(e):
                raise UserError(f'{where}, opens a cell with " and never closes it.') from e
            problem = UserError(f"{where}, is not {'TSV' if delimiter != ',' else 'CSV'}: {e}.")
        except UnicodeEncodeError:
            problem = UserError(f"{where}, is not UTF-8 text. Save the file as UTF-8.")
        if problem is None and not cells:
            continue
        if header is None:
            if problem:
                raise problem
            check_names(cells, f"{where}, the header,")
            if other := next((c for c in ",;\t|" if len(cells) == 1 and c in cells[0] and c != delimiter), None):
                raise UserError(
                    f"{where}, the header, is one cell with {other!r}. Separate the cells with {delimiter!r}."
                )
            header = cells
            continue
        if problem is None and len(cells) != len(header):
            problem = UserError(
                f"{where}, has {len(cells)} cells, but the header has {len(header)}. "
                'Put a cell that contains the delimiter or a line break between quotes (").'
            )
        yield where, problem or dict(zip(header, cells))


def check_names(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} names {twice!r} twice. Rename one of the columns.")


def read_parquet(path: Path, stream: BinaryIO) -> Rows:
    pyarrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    row = 0
    with tempfile.TemporaryFile() as decompressed:
        if endings(path)[1]:  # Parquet is read from its end
            copyfileobj(stream, decompressed)
            stream = cast(BinaryIO, decompressed)
        try:
            file = parquet.ParquetFile(stream)
            check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    yield f"{path}, row {row + 1} (index {row})", without_padding(value)
                    row += 1
        except UnicodeDecodeError as e:
            raise UserError(f"{path} has text that is not UTF-8, in row {row + 1} or soon after.") from e
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{path} cannot be read as Parquet: {' '.join(str(e).split())}") from e


def without_padding(fields: Any) -> Any:
    """A row of a table without the nulls inside its columns.

    Objects in a column share one type, so each has the keys of all others.
    """
    return {key: filled(value) for key, value in fields.items()}


def filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: filled(inner) for key, inner in value.items() if inner is not None}
    return [filled(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
