"""Read small files with clear errors, and write files that are complete or absent."""

import filecmp
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from glob import escape
from pathlib import Path
from typing import Any, Optional

import yaml

from litgpt.errors import UserError
from litgpt.storage.fields import SHAPES, TEMPLATE, misfit

# limits of a small file
JSON_BYTES, YAML_BYTES, TOKENIZER_BYTES = 2**25, 2**22, 2**28
DEPTH = 100  # nested objects and lists
DIGITS = 100  # of an integer
NODES = 100_000  # values of a YAML file, aliases expanded
NUMBER = re.compile(r"[-+]?(0[xb][0-9a-fA-F_]+|[0-9_:.]+)")  # in YAML
SURROGATE = re.compile(r"\\[uU](0000)?[dD][89a-fA-F]")  # an escape that may be half a surrogate pair
TOO_DEEP = f"it is nested more than {DEPTH} levels deep"
TOO_LONG = f"it has a number of more than {DIGITS} digits"


def is_there(path: Path) -> bool:
    """Whether the file exists. Raises `UserError` if the path is a folder, a pipe or a broken link."""
    if path.is_file():
        return True
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to a file that does not exist. Restore the file or remove the link.")
    if path.exists():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}. Replace it with a file.")
    return False


def check_size(path: Path, max_bytes: int) -> None:
    """Raise `UserError` unless `path` is a regular file (reading a pipe would block) of at most `max_bytes` bytes."""
    try:
        found = os.stat(path)
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    if not stat.S_ISREG(found.st_mode):
        is_there(path)
    if found.st_size > max_bytes:
        raise UserError(f"{path} has {found.st_size:,} bytes. The limit for such a file is {max_bytes:,}.")


def read_text(path: Path, max_bytes: int = TEMPLATE, encoding: str = "utf-8") -> str:
    """Read a text file. Raises `UserError` if it cannot be read, has more than `max_bytes` bytes, or is not UTF-8."""
    check_size(path, max_bytes)
    try:
        return path.read_text(encoding)
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}).") from e


def read_json(path: Path) -> Any:
    """Read a JSON file and check the fields that `SHAPES` lists for files of this name. Raises `UserError` if it cannot
    be read, is too large, is empty, is not JSON, or has a field of the wrong type."""
    text = read_text(path, JSON_BYTES, "utf-8-sig")
    if not text.strip():
        raise UserError(f"{path} is empty.")
    try:
        value = parse_json(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not JSON: {e.msg.removesuffix(' at')} at line {e.lineno}, column {e.colno}.") from e
    except ValueError as e:
        raise UserError(f"{path} is JSON that cannot be read: {e}.") from e
    return checked_value(value, text, path)


def parse_json(text: str) -> Any:
    """Parse JSON. Raises `json.JSONDecodeError` if it is not JSON, and `ValueError` if it is nested too deeply, or a
    number has too many digits."""
    try:
        value = json.loads(text, parse_int=whole_number)
    except RecursionError as e:
        raise ValueError(TOO_DEEP) from e
    if text.count("[") + text.count("{") > DEPTH:
        check_depth(value)
    return value


def whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(TOO_LONG)
    return int(text)


def check_depth(value: Any) -> None:
    """Raise `ValueError` if lists and objects are nested too deeply."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner for v in level for inner in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return
    raise ValueError(TOO_DEEP)


def checked_value(value: Any, text: str, path: Path) -> Any:
    """A parsed value, if it is valid Unicode and has the shape of files of this name."""
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            before = e.object[max(0, e.start - 20) : e.start]
            raise UserError(f"{path} has half of a surrogate pair, which is not valid text, after {before!r}.") from e
    if wrong := misfit(value, SHAPES[path.name]) if path.name in SHAPES else None:
        raise UserError(f"{path}: {wrong}")
    return value


class PlainSafeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader, in C if available. Dates stay text, as in JSON."""


PlainSafeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in PlainSafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> Any:
    """Read a YAML file and check the fields that `SHAPES` lists for files of this name. Raises as `read_json` does."""
    text = read_text(path, YAML_BYTES)
    return checked_value(parse_yaml(text, path), text, path)


def parse_yaml(text: str, where: Any) -> Any:
    """Parse YAML from `where` into the types that JSON has. Raises `UserError` if the text is not YAML, has a tag, is
    nested too deeply, or its aliases expand to too many values."""
    try:
        check_events(text)
        value = yaml.load(text, PlainSafeLoader)
        check_depth(value)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where} is not YAML: {e.problem}{place}.") from e
    except yaml.YAMLError as e:
        raise UserError(f"{where} is not YAML: {' '.join(str(e).split())}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is YAML that cannot be read: {e}.") from e
    return value


def check_events(text: str) -> None:
    """Raise `ValueError` for YAML with tags, or whose aliases expand to far more than its length suggests."""
    sizes: dict[str, int] = {}  # values below each anchor
    above: list[tuple[Optional[str], int]] = []  # open collections: the anchor, and the values before it
    n = 0
    for event in yaml.parse(text, PlainSafeLoader):
        if (tag := getattr(event, "tag", None)) is not None and tag.startswith("tag:yaml.org"):
            raise ValueError(f"it has the tag {tag!r}, which is not supported")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} has no complete anchor before it")
            n += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            sizes[anchor or ""] = n - before
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.ScalarEvent):
                if event.implicit[0] and len(event.value) > DIGITS and NUMBER.fullmatch(event.value):
                    raise ValueError(TOO_LONG)
                sizes[event.anchor or ""] = 1
            else:
                sizes.pop(event.anchor or "", None)
                above.append((event.anchor, n))
            n += 1
        if len(above) > DEPTH:
            raise ValueError(TOO_DEEP)
        if n > NODES:
            raise ValueError(f"it has more than {NODES:,} values after its aliases are expanded")


def home() -> Optional[Path]:
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None


def file_hash(path: Path) -> str:
    """SHA-256"""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def cache_place() -> Optional[Path]:
    """The folder in `LITGPT_CACHE`, by default `~/.cache/litgpt`; None without a home folder."""
    if given := os.environ.get("LITGPT_CACHE"):
        return Path(given)
    own = home()
    return None if own is None else own / ".cache" / "litgpt"


def link(source: Any, target: Any) -> None:
    """Hard-link a file, or copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def same(a: Path, b: Path) -> bool:
    """Whether two paths have the same content."""
    return b.is_file() and (os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False))


def flush_names(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    flush_names(path.parent)


def part_of(target: Path) -> Path:
    """A name beside `target` to write to until the file is complete. Removes the partial files of killed processes."""
    begin = f".{target.name}.{platform.node()}."
    for part in target.parent.glob(f"{escape(begin)}*.part"):
        number = part.name[len(begin) : -len(".part")]
        if re.fullmatch(r"[0-9]{1,9}", number) and not is_running(int(number), part):
            part.unlink(missing_ok=True)
    return target.with_name(f"{begin}{os.getpid()}.part")


def is_running(process: int, part: Path) -> bool:
    if process == os.getpid():
        return True
    if os.name == "nt":  # has no harmless signal
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
