"""Text files, for pretraining."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from litgpt.data.data_module import DataModule
from litgpt.data.sources import RowSource, TextPiece
from litgpt.errors import UserError

PIECE = 1 << 20  # characters of a document that are tokenized together


@dataclass(frozen=True)
class TextSource(RowSource):
    """A text file: one document."""

    def rows(self) -> Iterator[tuple[str, Any]]:
        with open(self.path, encoding="utf-8-sig", newline="") as f:
            try:
                piece, first = f.read(PIECE) + f.readline(), True
                while piece:
                    following = f.read(PIECE) + f.readline()
                    yield str(self.path), TextPiece(piece, first, last=not following)
                    piece, first = following, False
            except UnicodeDecodeError as e:
                raise UserError(f"{self.path} is not UTF-8 text ({e.reason}). Save the file as UTF-8.") from e


class TextFiles(DataModule):
    """Text files. Each is a document, split into rows and packed. All tokens are trained on.

    Args:
        train_data_path: A text file, a folder of .txt files, or a list of them.
        val_data_path: The same for validation. Default: hold out some of the training rows.
    """

    packed = True

    def __init__(
        self,
        train_data_path: Union[str, list[str]],
        val_data_path: Optional[Union[str, list[str]]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train_data_path, self.val_data_path = train_data_path, val_data_path

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        val = text_sources(self.val_data_path, "val_data_path") if self.val_data_path else None
        return text_sources(self.train_data_path, "train_data_path"), val


def text_sources(paths: Union[str, list[str]], option: str) -> list[RowSource]:
    found: list[RowSource] = []
    for path in [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]:
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            raise UserError(f"--data.{option}: {path} is neither a text file nor a folder with .txt files.")
        found += [TextSource(file) for file in files]
    return found
