"""Files of rows: every ending and compression, what a bad row is, and what spoils a whole file."""

import bz2
import csv
import gzip
import json
import lzma
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from litgpt.data.row_files import read_rows
from litgpt.errors import UserError
from tests.conftest import some

ROWS = [{"text": "one"}, {"text": 'zwei, "drei"\nü'}, {"text": "四"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def parquet(rows: list[dict], path: Path) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def as_bytes(ending: str, tmp_path: Path) -> bytes:
    """ROWS as a file of that ending."""
    if ending == ".json":
        return json.dumps(ROWS).encode()
    if ending == ".parquet":
        return parquet(ROWS, tmp_path / "rows")
    if ending in (".csv", ".tsv"):
        with open(tmp_path / "rows", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, ["text"], delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
        return (tmp_path / "rows").read_bytes()
    return JSONL


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path) -> list[Any]:
    return [value for _, value in read_rows(path)]


def places(path: Path) -> list[str]:
    """Where rows stand, without the path."""
    assert all(where.startswith(f"{path}, ") for where, _ in read_rows(path))
    return [where.removeprefix(f"{path}, ") for where, _ in read_rows(path)]


def error(path: Path) -> str:
    """What is said of a file that cannot be used."""
    with pytest.raises(UserError) as e:
        values(path)
    assert "\n" not in str(e.value)
    return str(e.value)


def problem(value: Any) -> str:
    """What is said of a bad row."""
    assert isinstance(value, UserError)
    return str(value)


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"])
def test_every_ending(tmp_path, ending, packed):
    data = as_bytes(ending, tmp_path)
    path = write(tmp_path / f"rows{ending}{packed}", PACK[packed](data) if packed else data)
    assert values(path) == ROWS
    shouted = write(tmp_path / f"ROWS{ending.upper()}{packed.upper()}", path.read_bytes())
    assert values(shouted) == ROWS


def test_places(tmp_path):
    assert places(write(tmp_path / "a.jsonl", b'{"a": 1}\n\n \r\n{"a": 2}\r\n3')) == ["line 1", "line 4", "line 5"]
    assert places(write(tmp_path / "a.json", "[1, 2]")) == ["row 1 (index 0)", "row 2 (index 1)"]
    assert places(write(tmp_path / "a.csv", 'a,b\n1,"2\n3"\n\n4,5\n')) == ["line 2", "line 5"]
    parquet([{"a": i} for i in range(600)], tmp_path / "a.parquet")
    assert places(tmp_path / "a.parquet")[599] == "row 600 (index 599)"
    assert next(read_rows(tmp_path / "a.csv")) == (f"{tmp_path / 'a.csv'}, line 2", {"a": "1", "b": "2\n3"})


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_byte_order_mark(tmp_path, ending):
    assert values(write(tmp_path / f"a{ending}", b"\xef\xbb\xbf" + as_bytes(ending, tmp_path))) == ROWS


def test_json_that_is_another_thing(tmp_path):
    assert values(write(tmp_path / "object.json", json.dumps({"data": ROWS}))) == ROWS
    assert values(write(tmp_path / "lines.json", JSONL)) == ROWS
    assert values(write(tmp_path / "lines.json.gz", gzip.compress(b"\n" + JSONL))) == ROWS
    assert places(tmp_path / "lines.json") == ["line 1", "line 2", "line 3"]
    number, low, pair = values(write(tmp_path / "n.json", "[NaN, -Infinity, 1e999]"))
    assert number != number and low == -pair == float("-inf")


def test_bad_lines_are_rows(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b'{"a": 1}\n{"a"\n{"a": "\xff"}\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n2\n"
    )
    good, cut, latin, deep, long, last = values(path)
    assert (good, last) == ({"a": 1}, 2)
    assert problem(cut) == f"{path}, line 2, is not JSON: Expecting ':' delimiter at line 2, column 5."
    assert problem(latin).startswith(f"{path}, line 3, is not UTF-8 text (byte 7 of the line)")
    assert problem(deep).startswith(f"{path}, line 4, is JSON that litgpt cannot read")
    assert isinstance(long, int) or problem(long).startswith(f"{path}, line 5, is JSON that litgpt cannot read")


def test_bad_csv_rows(tmp_path):
    path = write(tmp_path / "a.csv", b'a,b\n1,2\n1\n1,2,3\n"x"y,2\n\xff,2\n"3\n4",5\n6,7\n')
    one, few, many, quote, latin, two, three = values(path)
    assert (one, two, three) == ({"a": "1", "b": "2"}, {"a": "3\n4", "b": "5"}, {"a": "6", "b": "7"})
    assert problem(few).startswith(f"{path}, line 3, has 1 cells")
    assert problem(many).startswith(f"{path}, line 4, has 3 cells")
    assert problem(quote).startswith(f"{path}, line 5, is not CSV: ',' expected after")
    assert problem(latin).startswith(f"{path}, line 6, is not UTF-8 text")
    assert places(path)[5:] == ["line 7", "line 9"]


def test_csv_cells(tmp_path):
    long = "x" * 1_000_000  # beyond the limit of the csv module
    path = write(tmp_path / "a.csv", f'instruction,output\r\n"say ""hi"",\r\nplease",{long}\r\n,\r\n')
    assert values(path) == [
        {"instruction": 'say "hi",\r\nplease', "output": long},
        {"instruction": "", "output": ""},
    ]
    assert values(write(tmp_path / "a.tsv", "a\tb\n1,5\t2\n")) == [{"a": "1,5", "b": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", " is empty."),
        ("a.json", " \n", " is empty."),
        ("a.jsonl", "", " is empty."),
        ("a.csv", "", " is empty."),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), " is empty."),
        ("a.json", '[\n {"instruction": }\n]', " is not JSON: Expecting value at line 2, column 18."),
        ("a.json", '[\n{"a": 1}\n]\n]', " is not JSON: Extra data at line 4, column 1."),
        ("a.json", "[" * 100_000, " is JSON that litgpt cannot read: "),
        ("a.json", b'["\xff"]', " is not UTF-8 text (byte 2)"),
        ("a.json", '{"a": 1}', " holds an object."),
        ("a.json", '{"a": [1], "b": [2]}', " holds an object."),
        ("a.json", "3", " holds a number."),
        ("a.json", "[]", " has no rows."),
        ("a.json", '{"data": []}', " has no rows."),
        ("a.jsonl", "\n \n", " has no rows."),
        ("a.csv", "a,b\n", " has no rows."),
        ("a.csv", "\n\n", " has no rows."),
        ("a.csv", "a,b,a\n1,2,3\n", ", line 1, the header, names 'a' twice."),
        ("a.csv", b"a,\xff\n1,2\n", ", line 1, is not UTF-8 text"),
        ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n', ', line 3, opens a cell with " and never closes it.'),
        ("a.jsonl", JSONL.decode().encode("utf-16"), " is UTF-16 text."),
        ("a.txt", "hello", " has an unknown extension."),
        ("a.gz", gzip.compress(b"hello", mtime=0), " has an unknown extension."),
        ("a.jsonl.gz", JSONL, " cannot be decompressed: Not a gzipped file"),
    ],
)
def test_spoiled_files(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    assert error(path).startswith(f"{path}{message}")


@pytest.mark.parametrize("packed", PACK)
def test_cut_and_corrupt_archives(tmp_path, packed):
    data = PACK[packed](b"".join(b'{"text": "%x"}\n' % (i**40) for i in range(3000)))
    path = tmp_path / f"a.jsonl{packed}"
    for bad in (data[: len(data) // 2], data[:-1], data[:5000] + b"\0" * 100 + data[5100:], b"no archive"):
        assert error(write(path, bad)).startswith(f"{path} cannot be decompressed: ")
    path.write_bytes(PACK[packed](JSONL) + PACK[packed](JSONL))  # parts one after another
    assert values(path) == ROWS * 2


def test_spoiled_parquet(tmp_path):
    data = parquet(ROWS, tmp_path / "a.parquet")
    assert "cannot be read as Parquet" in error(write(tmp_path / "b.parquet", data[:-20]))
    assert "cannot be read as Parquet" in error(write(tmp_path / "c.parquet", "hello"))
    import pyarrow as arrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), tmp_path / "d.parquet")
    assert error(tmp_path / "d.parquet").endswith("d.parquet has no rows.")
    pyarrow.parquet.write_table(arrow.table([[1], [2]], names=["a", "a"]), tmp_path / "g.parquet")
    assert error(tmp_path / "g.parquet").endswith("g.parquet names 'a' twice. Rename one of the columns.")
    broken = arrow.StringArray.from_buffers(1, arrow.py_buffer(b"\0\0\0\0\1\0\0\0"), arrow.py_buffer(b"\xff"))
    pyarrow.parquet.write_table(arrow.table({"text": broken}), tmp_path / "f.parquet")
    assert "text that is not UTF-8, in row 1" in error(tmp_path / "f.parquet")


def test_no_file(tmp_path):
    write(tmp_path / "rows.jsonl", JSONL)
    write(tmp_path / "row.txt", "not of rows")
    missing = tmp_path / "row.jsonl"
    assert error(missing) == f"No file '{missing}' (--data.json_path). Did you mean '{tmp_path / 'rows.jsonl'}'?"
    assert error(tmp_path / "quite_another.json").endswith("quite_another.json' (--data.json_path).")
    assert "(--data.json_path)." in error(tmp_path / "nowhere" / "rows.jsonl")
    assert error(tmp_path).startswith(f"{tmp_path} is a folder.")


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_package_that_is_missing(tmp_path, monkeypatch, package, name):
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("litgpt.errors.importlib.import_module", missing)
    assert "pip install '.[data]'" in error(write(tmp_path / name, "x"))


@pytest.mark.parametrize("packed", some(["", ".gz", ".zst"], ".zst"))
@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_memory(tmp_path, ending, packed):
    """Sixty megabytes pass through less than ten."""
    draw = random.Random(0)
    texts = [draw.randbytes(8000).hex() for _ in range(400)]
    rows = [json.dumps({"text": text}) + "\n" if ending == ".jsonl" else f'"{text}"\n' for text in texts]
    block = "".join(rows).encode()
    pack: Any = {"": bytes, ".gz": lambda data: gzip.compress(data, 1), ".zst": zst}[packed]
    path = tmp_path / f"a{ending}{packed}"
    with open(path, "wb") as f:
        if ending == ".csv":
            f.write(pack(b"text\n"))
        for _ in range(10):  # archives of several parts
            f.write(pack(block))
    del block, rows
    tracemalloc.start()
    try:
        assert sum(value["text"] == texts[i % 400] for i, (_, value) in enumerate(read_rows(path))) == 4000
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_real_files(real_data):
    counts = {file.name: len(values(file)) for file in sorted((real_data / "instruct").glob("*.json*"))}
    assert counts["gsm8k_train.jsonl"] == 7473 and counts["alpaca_13k.json"] == 13354 and counts["lima.json"] == 1029
