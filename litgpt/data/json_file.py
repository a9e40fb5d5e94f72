"""Rows from the user's own files."""

import glob
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Optional, Union

from litgpt.data.data_module import DataModule
from litgpt.data.forms import FORMS
from litgpt.data.row_files import READERS, endings, no_file
from litgpt.data.sources import RowSource
from litgpt.errors import UserError, nearest, remark

Entry = Union[str, dict[str, Any]]
Entries = Union[str, dict[str, Any], list[Entry]]

ENTRY_KEYS = ("path", "columns", "weight", "form", "split", "rows")
TEXT = ".txt"
PATTERN = re.compile(r"[*?\[]")
RESULT = "hyperparameters.yaml"  # is in the folder of a run
MODEL_FILES = (RESULT, "config.json", "tokenizer.json", "tokenizer.model", ".safetensors", ".pth", ".bin")  # or endings
TRAIN, VAL, TEST = ("train", "training"), ("val", "valid", "validation", "dev", "eval"), ("test",)
remark_once = cache(remark)  # a run looks into a folder more than once


class JSON(DataModule):
    """Rows from files: JSON, JSONL, CSV, TSV, or Parquet, compressed or not.

    Args:
        json_path: A file, a pattern like data/*.jsonl, a folder, hf:ORG/NAME for a data set on the hub, or a list of
            these. An entry of the list may be a mapping with its own options: path, columns, weight, form, split, and
            rows: the number of its first rows, or a fraction. split: val makes validation rows; other names select the
            split of a data set on the hub.
        val_path: The same for validation rows. Default: hold out some training rows.
        format: Format of the rows, such as alpaca, messages, or sharegpt. Default: detected from the columns.
        columns: Maps litgpt's columns to the file's, such as {instruction: question, output: answer}.
        weights: How often the rows of each path are seen in an epoch, such as [1, 0.5]. Default: once.
    """

    def __init__(
        self,
        json_path: Entries,
        val_path: Optional[Entries] = None,
        format: Optional[str] = None,
        columns: Optional[dict[str, str]] = None,
        weights: Optional[list[float]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.json_path = entries_of(json_path, "--data.json_path")
        self.val_path = entries_of(val_path, "--data.val_path") if val_path else []
        self.format, self.columns = format, columns
        check_form(format, "--data.format")
        if weights and (len(weights) != len(self.json_path) or not all(0 < w < math.inf for w in weights)):
            raise UserError(
                f"--data.weights {weights}: expected one positive number for each of {len(self.json_path)} paths."
            )
        for entry, weight in zip(self.json_path, weights or []):
            if "weight" in entry:
                raise UserError(
                    f"--data.weights {weights}: {entry['path']} has a weight of its own. Remove one of them."
                )
            entry["weight"] = weight

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        train, val = expand(self.json_path, "--data.json_path", self.columns, self.format)
        if self.val_path:
            own, held = expand(self.val_path, "--data.val_path", self.columns, self.format, inherit=True)
            val = [*own, *held]
        if not train:
            raise UserError(f"{', '.join(str(s.path) for s in val)}: expected training rows as well.")
        return train, val or None

    def places(self) -> list[Path]:
        train, val = self.sources()
        paths = [Path(source.path) for source in [*train, *(val or [])] if not str(source.path).startswith("hf:")]
        return [path for path in paths if path.exists()]


def expand(
    entries: list[dict[str, Any]],
    option: str,
    columns: Optional[dict[str, str]] = None,
    form: Optional[str] = None,
    inherit: bool = False,
) -> tuple[list[RowSource], list[RowSource]]:
    """The training rows and the validation rows that paths with their options name.

    Args:
        entries: As `entries_of` returns them.
        option: Named in errors.
        columns: Of files that say nothing of it. It applies to several files only where it fits.
        form: The same.
        inherit: Whether it applies to a single file, too, only where it fits.
    """
    found: list[tuple[bool, dict[str, Any], Union[str, Path]]] = []
    for entry in entries:
        found += [(is_val, entry, path) for is_val, path in files_of(entry["path"], entry.get("split"), option)]
    sets: tuple[list[RowSource], list[RowSource]] = ([], [])
    for is_val, entry, path in found:
        own = entry.get("columns") is not None or entry.get("form") is not None
        sets[is_val].append(
            RowSource(
                path,
                weight=float(entry.get("weight") or 1.0),
                columns=entry.get("columns") if own else columns,
                form=entry.get("form") if own else form,
                inherits=not own and (inherit or is_val or len(found) > 1),
                limit=entry.get("rows"),
            )
        )
    return sets


def is_data(name: str) -> bool:
    """Whether a word of a command line names data rather than a data set or a model."""
    path = Path(name)
    if name and path.is_dir():
        names = [file.name for file in path.iterdir()]
        is_model = any(name.endswith(MODEL_FILES) for name in names)
        return not is_model and any(True for _ in files_below(path))
    if name.startswith("hf:") or PATTERN.search(name) or ("/" in name and path.is_file()):
        return True
    return is_readable(path) and (path.suffix.islower() or path.exists())  # litgpt.data.JSON is a class


def is_readable(path: Path) -> bool:
    return endings(path)[0] in (*READERS, TEXT)


def files_below(folder: Path) -> Iterator[Path]:
    """The files of rows and texts in a folder and below, without hidden ones and the results of runs."""
    seen = set()  # a link may lead back
    for name, folders, names in os.walk(folder, followlinks=True):
        place, real = Path(name), os.path.realpath(name)
        if real in seen or (place != folder and RESULT in names):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        files = [place / name for name in names if not name.startswith(".") and is_readable(Path(name))]
        yield from (file for file in files if file.is_file())


def from_entries(entries: list[Entry]) -> tuple[str, dict[str, Any]]:
    """The class of the data set that reads these files, and its arguments. Files of text make documents."""
    paths = [Path(entry) for entry in entries if isinstance(entry, str)]
    files = [file for p in paths for file in (files_below(p) if p.is_dir() else [p] if is_readable(p) else [])]
    if len(paths) == len(entries) and files and all(endings(file)[0] == TEXT for file in files):
        return "TextFiles", {"train_data_path": [str(path) for path in paths]}
    return "JSON", {"json_path": entries}


def entries_of(value: Entries, option: str) -> list[dict[str, Any]]:
    """Each path with its options. Raises `UserError` if one of them is not valid."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{option} is empty. Expected a file.")
    entries = [dict(v) if isinstance(v, Mapping) else {"path": str(v)} for v in values]
    for entry in entries:
        check_entry(entry)
    return entries


def check_entry(entry: dict[str, Any]) -> None:
    """Raise `UserError` if the options of a path are not valid."""
    name = entry.get("path")
    unknown = next((key for key in entry if key not in ENTRY_KEYS), None)
    if unknown is not None or not isinstance(name, (str, Path)) or not str(name).strip():
        problem = f"unknown option {unknown!r}.{nearest(str(unknown), ENTRY_KEYS)}" if unknown else "expected one path."
        raise UserError(f"--data {entry}: {problem} The options of a file are {', '.join(ENTRY_KEYS)}.")
    weight, rows, form, columns = (entry.get(key) for key in ("weight", "rows", "form", "columns"))
    if weight is not None and not (type(weight) in (int, float) and 0 < weight < math.inf):
        raise UserError(f"{name}: weight {weight} is not a positive number.")
    if rows is not None and not (type(rows) is int and rows > 0) and not (type(rows) is float and 0 < rows < 1):
        raise UserError(f"{name}: rows {rows} is neither a number of rows nor a fraction between 0 and 1.")
    check_form(form, f"{name}: form")
    texts = [*columns, *columns.values()] if isinstance(columns, Mapping) else [None]
    if columns is not None and not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: columns {columns} is not a mapping like {{instruction: question, output: answer}}.")


def check_form(form: Any, option: str) -> None:
    if form is not None and form not in FORMS:
        raise UserError(f"{option} {form} is not known. Choose from {', '.join(FORMS)}.{nearest(str(form), FORMS)}")


def files_of(path: str, split: Optional[str], option: str) -> list[tuple[bool, Union[str, Path]]]:
    """What a path stands for, each with whether it is for validation.

    Args:
        path: A file, a pattern, a folder, or a data set on the hub.
        split: The part to use: `val`, or the split of a data set on the hub.
        option: Named in errors.
    """
    is_val = split in VAL
    if path.startswith("hf:"):
        has_split = ":" in path.removeprefix("hf:")
        return [(is_val, path if has_split or split is None else f"{path}:{split}")]
    if Path(path).is_dir():
        return in_folder(Path(path), split)
    if split is not None and split not in (*TRAIN, *VAL):
        raise UserError(f"{path}: split {split} is not known. For files, choose train or val.")
    if not Path(path).is_file() and PATTERN.search(path):
        found = [Path(p) for p in sorted(glob.glob(path, recursive=True)) if Path(p).is_file()]
        if not found:
            raise UserError(f"No file matches {path!r} ({option}).")
        return [(is_val, file) for file in found]
    if not Path(path).is_file():
        raise no_file(Path(path), option)
    return [(is_val, Path(path))]


def in_folder(folder: Path, split: Optional[str]) -> list[tuple[bool, Union[str, Path]]]:
    """The files of rows in a folder and below. Files named train, val, or test, or in folders of that name, are used as
    such; test files validate if there are no others for that. Without a training file, all others are training files.
    """
    found = sorted(files_below(folder))
    files = [p for p in found if endings(p)[0] in READERS]
    if not files:
        raise UserError(f"{folder} has no file of rows. Expected train.jsonl or similar.")
    stems = [p.parent / p.name.partition(".")[0] for p in files]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        names = ", ".join(p.name for p, stem in zip(files, stems) if stem == twice)
        raise UserError(f"{twice.parent} has {twice.name} in several formats: {names}. Remove all but one.")

    def part(file: Path) -> str:
        words = [re.split(r"[^a-z]", name.lower())[0] for name in reversed(file.relative_to(folder).parts)]
        return next((word for word in words if word in (*TRAIN, *VAL, *TEST)), "")

    if split is not None:
        chosen = [p for p in files if part(p) == split or {part(p), split} <= set(VAL)]
        if not chosen:
            raise UserError(f"{folder} has no file of the split {split}. Found: {', '.join(p.name for p in files)}.")
        return [(split in VAL, p) for p in chosen]
    val = [p for p in files if part(p) in VAL] or [p for p in files if part(p) in TEST]
    train = [p for p in files if part(p) in TRAIN] or [p for p in files if part(p) not in (*VAL, *TEST)]
    if unused := [str(p.relative_to(folder)) for p in found if p not in train and p not in val]:
        remark_once(f"{folder}: not used: {', '.join(unused[:10])}{', ...' if len(unused) > 10 else ''}.")
    return [*((False, p) for p in train), *((True, p) for p in val)]
