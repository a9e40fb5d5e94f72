"""Rows from a JSON or JSONL file of one's own."""

import json
from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, Row, instruction_row
from litgpt.errors import UserError, kind, nearest
from litgpt.files import read_json


class JSON(DataModule):
    """Rows with `instruction`, `input` (may be missing) and `output`.

    Args:
        json_path: A .json file (a list), a .jsonl file (a row a line), or a folder with train.json and val.json.
    """

    def __init__(self, json_path: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.json_path = Path(json_path)

    def rows(self) -> tuple[list[Row], Optional[list[Row]]]:
        if not self.json_path.is_dir():
            return read_rows(self.json_path), None
        train, val = (self.in_folder(name) for name in ("train", "val"))
        if train is None:
            raise UserError(f"{self.json_path} has no train.json and no train.jsonl.")
        if val is not None and self.val_split_fraction is not None:
            raise UserError(f"{self.json_path} has {val.name}: leave --data.val_split_fraction away.")
        return read_rows(train), read_rows(val) if val else None

    def in_folder(self, name: str) -> Optional[Path]:
        return next((p for e in (".json", ".jsonl") if (p := self.json_path / (name + e)).is_file()), None)


def read_rows(path: Path) -> list[Row]:
    """Raises:
    UserError: the file cannot be read, or a row has not the right form; file and row are named.
    """
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.json*")] if path.parent.is_dir() else []
        raise UserError(f"No file {str(path)!r} (--data.json_path).{nearest(str(path), near)}")
    if path.suffix == ".jsonl":
        rows = [instruction_row(fields, f"{path}, line {line},") for line, fields in read_lines(path)]
    elif path.suffix == ".json":
        loaded = read_json(path)
        if not isinstance(loaded, list):
            raise UserError(f"{path} holds {kind(loaded)}; a list of rows is wanted.")
        rows = [instruction_row(fields, f"{path}, row {i + 1} (index {i}),") for i, fields in enumerate(loaded)]
    else:
        raise UserError(f"{path} is no .json and no .jsonl file.")
    if not rows:
        raise UserError(f"{path} has no rows.")
    return rows


def read_lines(path: Path) -> list[tuple[int, Any]]:
    """Line numbers, from 1, and values of a JSONL file; blank lines are passed over."""
    values = []
    with open(path, encoding="utf-8-sig", errors="strict") as f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip():
                    values.append((number, json.loads(line.rstrip("\r\n"))))
        except json.JSONDecodeError as e:
            raise UserError(f"{path} is not JSON: {e.msg} at line {number}, column {e.colno}.") from e
        except UnicodeDecodeError as e:
            raise UserError(f"{path} is not UTF-8 text ({e.reason}, near line {len(values) + 1}).") from e
    return values
