"""Rows from the user's own files."""

import math
from pathlib import Path
from typing import Any, Optional, Union

from litgpt.data.base import DataModule
from litgpt.data.row_files import no_file
from litgpt.data.sources import RowSource
from litgpt.errors import UserError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


class JSON(DataModule):
    """Rows from files: JSON, JSONL, CSV, TSV, or Parquet, compressed or not.

    Args:
        json_path: A file, a folder with train and val files, hf:ORG/NAME for a data set on the hub, or a list of these.
        val_path: A file with the validation rows, hf:ORG/NAME:SPLIT, or a list. Default: hold out some training rows.
        format: Format of the rows, such as alpaca, messages, or sharegpt. Default: detected from the columns.
        columns: Maps litgpt's columns to the file's, such as {instruction: question, output: answer}.
        weights: How often the rows of each path are seen in an epoch, such as [1, 0.5]. Default: once.
    """

    def __init__(
        self,
        json_path: Union[str, list[str]],
        val_path: Optional[Union[str, list[str]]] = None,
        format: Optional[str] = None,
        columns: Optional[dict[str, str]] = None,
        weights: Optional[list[float]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.json_path = [str(p) for p in ([json_path] if isinstance(json_path, (str, Path)) else json_path)]
        self.val_path = [str(p) for p in ([val_path] if isinstance(val_path, (str, Path)) else val_path or [])]
        self.format, self.columns = format, columns
        self.weights = weights or [1.0] * len(self.json_path)
        if len(self.weights) != len(self.json_path) or not all(0 < w < math.inf for w in self.weights):
            raise UserError(
                f"--data.weights {self.weights}: expected one positive number for each of {len(self.json_path)} paths."
            )

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        train = list(zip(self.json_path, self.weights))
        val = self.val_path
        if len(train) == 1 and Path(train[0][0]).is_dir():
            folder = Path(train[0][0])
            files = {name: in_folder(folder, name) for name in ("train", "val")}
            if files["train"] is None:
                raise UserError(f"{folder} has no training file. Expected train.json, train.jsonl, or similar.")
            train = [(str(files["train"]), self.weights[0])]
            val = val or [str(p) for p in [files["val"]] if p]
        for path in val:  # check them before the training rows are read
            if not path.startswith("hf:") and not Path(path).is_file():
                raise no_file(Path(path), "--data.val_path")
        options: dict[str, Any] = {"columns": self.columns, "form": self.format}
        val_sources = [RowSource(p, inherits=True, **options) for p in val] if val else None
        return [RowSource(p, w, **options) for p, w in train], val_sources


def in_folder(folder: Path, name: str) -> Optional[Path]:
    """The file `name` in `folder`, with any known extension."""
    found = sorted(p for p in folder.glob(f"{name}.*") if any(f"{name}{e}" in p.name for e in ENDINGS))
    if len(found) > 1:
        raise UserError(f"{folder} has several {name} files: {', '.join(p.name for p in found)}. Remove all but one.")
    return found[0] if found else None
