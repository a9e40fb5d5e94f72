"""Files that appear whole or not at all, and readers that say what is wrong."""

import filecmp
import json
import os
import platform
import shutil
import time
from glob import escape
from pathlib import Path
from typing import Any

from litgpt.errors import UserError


def read_json(path: Path) -> Any:
    """Raises:
    UserError: the file cannot be read, is empty, or is not JSON (with line and column).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}).") from e
    if not text.strip():
        raise UserError(f"{path} is empty.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not JSON: {e.msg.removesuffix(' at')} at line {e.lineno}, column {e.colno}.") from e


def link(source: Any, target: Any) -> None:
    """A second name for a file, or a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def same(a: Path, b: Path) -> bool:
    """Whether two names stand for the same content."""
    return b.is_file() and (os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False))


def flush_names(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system has a way to ask for it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    flush_names(path.parent)


def part_of(target: Path) -> Path:
    """A name beside `target` to write under until the file is complete. What processes left that were killed while they
    wrote is removed."""
    begin = f".{target.name}.{platform.node()}."
    for part in target.parent.glob(f"{escape(begin)}*.part"):
        number = part.name[len(begin) : -len(".part")]
        if number.isdigit() and not is_running(int(number), part):
            part.unlink(missing_ok=True)
    return target.with_name(f"{begin}{os.getpid()}.part")


def is_running(process: int, part: Path) -> bool:
    if process == os.getpid():
        return True
    if os.name == "nt":  # there is no harmless signal
        return time.time() - part.stat().st_mtime < 24 * 3600
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
