"""Rows from files of one's own."""

import math
from pathlib import Path
from typing import Any, Optional, Union

from litgpt.data.base import DataModule, RowSource
from litgpt.data.row_files import no_file
from litgpt.errors import UserError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


class JSON(DataModule):
    """Rows from files: JSON, JSONL, CSV, TSV or Parquet, compressed or not.

    Args:
        json_path: A file; a folder with train and val files; hf:ORG/NAME for a data set of the hub; or a list of them.
        val_path: A file (or hf:ORG/NAME:SPLIT, or a list) with the validation rows, instead of holding some back.
        format: The form of the rows, for example alpaca, messages or sharegpt; by default it is recognised.
        columns: Our keys to the file's, where they differ, as {instruction: question, output: answer}.
        weights: How often the rows of each path are seen in an epoch, as [1, 0.5]; by default once.
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
                f"--data.weights {self.weights}: one number above 0 for each of {len(self.json_path)} paths."
            )

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        train = list(zip(self.json_path, self.weights))
        val = self.val_path
        if len(train) == 1 and Path(train[0][0]).is_dir():
            folder = Path(train[0][0])
            files = {name: in_folder(folder, name) for name in ("train", "val")}
            if files["train"] is None:
                raise UserError(f"{folder} has no train file, such as train.json or train.jsonl.")
            train = [(str(files["train"]), self.weights[0])]
            val = val or [str(p) for p in [files["val"]] if p]
        for path in val:  # before the training rows are read
            if not path.startswith("hf:") and not Path(path).is_file():
                raise no_file(Path(path), "--data.val_path")
        more: dict[str, Any] = {"columns": self.columns, "form": self.format}
        held = [RowSource(p, inherits=True, **more) for p in val] if val else None
        return [RowSource(p, w, **more) for p, w in train], held


def in_folder(folder: Path, name: str) -> Optional[Path]:
    """The file `name` in `folder`, whatever its ending."""
    found = sorted(p for p in folder.glob(f"{name}.*") if any(f"{name}{e}" in p.name for e in ENDINGS))
    if len(found) > 1:
        raise UserError(f"{folder} has several {name} files: {', '.join(p.name for p in found)}.")
    return found[0] if found else None
