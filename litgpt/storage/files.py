"""Files that appear whole or not at all, and readers that say what is wrong."""

import filecmp
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

# what a small file may have at most
JSON_BYTES, YAML_BYTES, TOKENIZER_BYTES = 2**25, 2**22, 2**28
DEPTH = 100  # objects and lists within each other
DIGITS = 100  # of a whole number
NODES = 100_000  # values of a YAML file, with those that aliases repeat
NUMBER = re.compile(r"[-+]?(0[xb][0-9a-fA-F_]+|[0-9_:.]+)")  # in YAML
HALF = re.compile(r"\\[uU](0000)?[dD][89a-fA-F]")  # what may write half a surrogate pair


def is_there(path: Path) -> bool:
    """Whether there is a file of this name.

    Raises:
        UserError: something else has the name: a folder, a pipe, a link to nothing.
    """
    if path.is_file():
        return True
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to a file that does not exist. Restore the file or remove the link.")
    if path.exists():
        raise UserError(
            f"{path} is {'a folder' if path.is_dir() else 'not an ordinary file'}. Put a file in its place."
        )
    return False


def check_size(path: Path, most: int) -> None:
    """Raise `UserError` unless this is an ordinary file of at most `most` bytes. Reading a pipe would never end."""
    try:
        found = os.stat(path)
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    if not stat.S_ISREG(found.st_mode):
        is_there(path)
    if found.st_size > most:
        raise UserError(f"{path} has {found.st_size:,} bytes. A file of its kind has at most {most:,}.")


def read_text(path: Path, most: int = TEMPLATE, encoding: str = "utf-8") -> str:
    """Raises:
    UserError: the file cannot be read, is too large, or is not UTF-8.
    """
    check_size(path, most)
    try:
        return path.read_text(encoding)
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}).") from e


def read_json(path: Path) -> Any:
    """The value in a JSON file, whose fields are checked where files of this name have known ones.

    Raises:
        UserError: the file cannot be read, is too large, is empty, is not JSON (with line and column), or a field has
            another type.
    """
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
    """Raises:
    json.JSONDecodeError: it is not JSON.
    ValueError: it is nested too deeply, or has a number with too many digits.
    """
    try:
        value = json.loads(text, parse_int=whole_number)
    except RecursionError as e:
        raise ValueError(f"it is nested more than {DEPTH} levels deep") from e
    if text.count("[") + text.count("{") > DEPTH:
        check_depth(value)
    return value


def whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"it has a number of more than {DIGITS} digits")
    return int(text)


def check_depth(value: Any) -> None:
    """Raise `ValueError` where lists and objects lie too deep in each other."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner for v in level for inner in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEPTH} levels deep")


def checked_value(value: Any, text: str, path: Path) -> Any:
    """A value that was read, if it is of the shape that files of this name have."""
    if HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            behind = e.object[max(0, e.start - 20) : e.start]
            raise UserError(f"{path} has half a surrogate pair, which is not text, behind {behind!r}.") from e
    if wrong := misfit(value, SHAPES[path.name]) if path.name in SHAPES else None:
        raise UserError(f"{path}: {wrong}")
    return value


class PlainSafeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, the fast one where it is there. A date is text, as it is in JSON."""


PlainSafeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in several if not tag.endswith(":timestamp")]
    for first, several in PlainSafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> Any:
    """The value in a YAML file, whose fields are checked where files of this name have known ones.

    Raises:
        UserError: as `read_json` and `parse_yaml`.
    """
    text = read_text(path, YAML_BYTES)
    return checked_value(parse_yaml(text, path), text, path)


def parse_yaml(text: str, where: Any) -> Any:
    """The value of a YAML text, of the types that JSON has.

    Args:
        where: What the text is, for messages.

    Raises:
        UserError: it is not YAML, has a tag, is nested too deeply, or its aliases repeat too much.
    """
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
    """Raise `ValueError` for a YAML text that takes more time or memory than its length shows, or has tags."""
    sizes: dict[str, int] = {}  # values below each anchor
    above: list[tuple[Optional[str], int]] = []  # what the value lies in: the anchor, and the values before it
    n = 0
    for event in yaml.parse(text, PlainSafeLoader):
        if (tag := getattr(event, "tag", None)) is not None and tag.startswith("tag:yaml.org"):
            raise ValueError(f"it has the tag {tag!r}, which is not supported")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} stands for nothing that is complete")
            n += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            sizes[anchor or ""] = n - before
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.ScalarEvent):
                if event.implicit[0] and len(event.value) > DIGITS and NUMBER.fullmatch(event.value):
                    raise ValueError(f"it has a number of more than {DIGITS} digits")
                sizes[event.anchor or ""] = 1
            else:
                sizes.pop(event.anchor or "", None)
                above.append((event.anchor, n))
            n += 1
        if len(above) > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} levels deep")
        if n > NODES:
            raise ValueError(f"it has more than {NODES:,} values, with those that aliases repeat")


def home() -> Optional[Path]:
    """The user's home folder, if there is one."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user whom the system does not know
        return None


def cache_place() -> Optional[Path]:
    """The folder that `LITGPT_CACHE` names, by default `~/.cache/litgpt`; None where there is no home."""
    if given := os.environ.get("LITGPT_CACHE"):
        return Path(given)
    own = home()
    return None if own is None else own / ".cache" / "litgpt"


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
        if re.fullmatch(r"[0-9]{1,9}", number) and not is_running(int(number), part):
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
