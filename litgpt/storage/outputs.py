"""Output files and folders. Commands remove only files that they recorded and that have not changed since.

A folder that is written at once has a `checksums.json` with all of its files. Files that are written one by one, maybe
next to files of others, are recorded in `.litgpt.json` beside them. Both store the size, the CRC-32 and the time of
modification of each file.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock, Timeout

from litgpt.errors import UserError, remark
from litgpt.storage.files import current_umask, flush_names, home, read_json, same, write_text

SUMS, SINGLE = "checksums.json", ".litgpt.json"
CARD = "README.md"  # of a result; one that people wrote or changed passes to the result that replaces it
NAMED = 3  # files named in a message
KEPT = ("the current folder", "your home folder")  # in which no output may be removed
Entry = list[int]  # size in bytes, CRC-32, modification time in ns


# records of files


def entry(path: Path, crc: bool = True) -> Entry:
    """The record of a file. Without the CRC-32, a copy of the file does not match it."""
    stat = path.stat()
    return [stat.st_size, checksum(path) if crc else -1, stat.st_mtime_ns]


def checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def unchanged(path: Path, then: Entry) -> bool:
    """Whether a file, or a copy of it, still matches its record."""
    stat = path.stat()
    if stat.st_size != then[0]:
        return False
    return stat.st_mtime_ns in then[2:] or checksum(path) == then[1]


def write_sums(folder: Path, **more: Any) -> None:
    """Record all files of a folder in its `checksums.json`, together with the fields `more`."""
    files = {p.relative_to(folder).as_posix(): entry(p) for p in sorted(files_below(folder)) if p.name != SUMS}
    (folder / SUMS).write_text(json.dumps({**more, "files": files}, indent=1) + "\n", encoding="utf-8")


def listed(file: Path) -> dict[Path, list[Entry]]:
    """The files that `file` records, each with the records that it may match; empty if `file` is not valid."""
    try:
        found = read_json(file)["files"]
    except UserError:
        return {}
    records = {file.parent / name: e if e and isinstance(e[0], list) else [e] for name, e in found.items()}
    return {path: entries for path, entries in records.items() if all(len(e) in (2, 3) for e in entries)}


def is_ours(path: Path, file: Optional[Path] = None) -> bool:
    """Whether a file is unchanged since litgpt recorded it in `file`, by default `.litgpt.json` beside it."""
    known = listed(file or path.with_name(SINGLE)).get(path, [])
    return path.is_file() and not path.is_symlink() and any(unchanged(path, then) for then in known)


def put_single(temporary: Path, path: Path) -> None:
    """Move a complete file to `path` and record it. The record keeps the previous file too, so that a kill between the
    two steps leaves a known file."""
    known = listed(path.with_name(SINGLE))
    known[path] = [entry(temporary), *known.get(path, [])][:2]
    write_singles(path.with_name(SINGLE), known)
    os.replace(temporary, path)
    flush_names(path.parent)


def write_singles(file: Path, known: dict[Path, list[Entry]]) -> None:
    names = {path.relative_to(file.parent).as_posix(): entries for path, entries in known.items()}
    write_text(file, json.dumps({"files": names}, indent=1) + "\n")


def write_single(path: Path, text: str) -> None:
    """Write a text file atomically and record it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_text(temporary, text)
    put_single(temporary, path)


def files_below(folder: Path) -> Iterator[Path]:
    """All files and links in a folder and its subfolders. Links are not followed."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in files)
        yield from (Path(place, name) for name in folders if Path(place, name).is_symlink())


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The recorded, unchanged files of a folder (and the records themselves), and all others."""
    paths = sorted(files_below(folder))
    records = {path: found for path in paths if path.name in (SUMS, SINGLE) and (found := listed(path))}
    known = {path: entries for found in records.values() for path, entries in found.items()}
    ours: list[Path] = []
    others: list[Path] = []
    for path in paths:
        same = not path.is_symlink() and any(unchanged(path, then) for then in known.get(path, []))
        (ours if same or path in records else others).append(path)
    return ours, others


def discard(folder: Path) -> bool:
    """Remove our files from a folder, and the folder if it is then empty. Returns whether it is gone."""
    ours, _ = split(folder)
    for path in ours:
        path.unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(place)
    return not folder.exists()


# checks before writing


def check_place(out: Path, sources: Iterable[Path] = (), option: str = "--out_dir") -> None:
    """Raise `UserError` if results must not be written to a folder, which `option` names, because of where it is or
    because the command reads something in it (`sources`)."""
    place = out.resolve()
    taken = {KEPT[0]: Path.cwd(), **{str(source): source.resolve() for source in sources}}
    if (own := home()) is not None:
        taken[KEPT[1]] = own
    for what, path in taken.items():
        if place in (path, *path.parents):
            hint = f", such as {free_name(out)}" if what not in KEPT else ""
            relation = "is" if place == path else "contains"
            raise UserError(f"{option} {out} {relation} {what}. Choose another folder{hint}.")
    if (place / ".git").exists():
        raise UserError(f"{option} {out} is a git repository. Choose another folder.")
    above = next(p for p in (out, *out.parents) if p.exists() or p.is_symlink())
    if not above.is_dir():
        raise UserError(f"{option} {out}: {above} is not a folder. Choose another path.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{option} {out}: {above} is not writable. Choose another folder.")


def check_replaceable(
    out: Path, overwrite: Optional[bool], sources: Iterable[Path] = (), option: str = "--out_dir"
) -> None:
    """Raise `UserError` unless `out` is empty, or contains only our files and `overwrite` is set (None for commands
    without this option). Other arguments as for `check_place`."""
    check_place(out, sources, option)
    if not out.exists() or not any(path.name != CARD for path in out.iterdir()):
        return
    refuse_others(out, split(out)[1], option)
    if not overwrite:
        more = ", or pass --overwrite true" if overwrite is False else ""
        raise UserError(f"{option} {out} is not empty. Choose another folder{more}.")


def check_file(out: Path, overwrite: bool, option: str) -> None:
    """Raise `UserError` if a file exists that litgpt did not write, unless `overwrite` is set."""
    if out.is_dir():
        raise UserError(f"{option} {out} is a folder. Pass the path of a file.")
    if out.exists() and not overwrite and not is_ours(out):
        raise UserError(
            f"{option} {out} exists, and litgpt did not write it. Choose another path, or pass --overwrite true."
        )


def refuse_others(out: Path, others: list[Path], option: str = "--out_dir") -> None:
    """Raise `UserError` if there are files that litgpt must not remove, but for a card, which `new_folder` keeps."""
    others = [path for path in others if path.name != CARD or not has_own_card(path.parent)]
    if others:
        names = ", ".join(str(path) for path in others[:NAMED]) + (", ..." if len(others) > NAMED else "")
        raise UserError(
            f"{option} {out} contains files that litgpt did not write, or that have changed: {names}. Choose another "
            "folder, or move them."
        )


# writing


@contextmanager
def exclusive(out: Path, option: str = "--out_dir") -> Iterator[None]:
    """Lock a file or folder for writing, and clean up after killed processes. Raises `UserError` if another process
    holds the lock."""
    place = out.resolve()
    with locked(place.with_name(f".{place.name}.lock"), f"{option} {out}"):
        tidy(place)
        yield


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock file, then remove it. Raises `UserError` if another process holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0.2)  # `is_locked` may hold it for a moment
    try:
        lock.acquire()
    except Timeout as e:
        raise UserError(f"{what}: another process is writing there.") from e
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()


def is_locked(file: Path) -> bool:
    """Whether a process holds a lock file. Needs no permission to write."""
    if not file.is_file():
        return False
    try:
        if sys.platform == "win32":
            with FileLock(file, timeout=0):
                return False
        import fcntl

        with open(file, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
    except (BlockingIOError, Timeout):
        return True
    except OSError:  # the file is gone, or the disk has no locks
        return False
    return False


def tidy(out: Path) -> None:
    """Finish or undo what a killed `new_folder` left beside a folder."""
    for path in out.parent.glob(f"{escape(marked(out, 'old'))}*"):
        put_back(path, out)
    for path in out.parent.glob(f"{escape(marked(out, 'new'))}*"):
        shutil.rmtree(path, ignore_errors=True)


def marked(out: Path, what: str) -> str:
    """The prefix of the names of temporary folders."""
    return f".{out.name}.litgpt-{what}-"


@contextmanager
def new_folder(target: Path, sums: bool = True) -> Iterator[Path]:
    """A temporary folder that replaces `target` if the block succeeds, with a `checksums.json` of all its files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=marked(target, "new"), dir=target.parent))
    try:
        yield temporary
        if sums and not (temporary / SUMS).exists():
            write_sums(temporary)
        if has_own_card(target):
            shutil.copyfile(target / CARD, temporary / CARD)
        mask = current_umask()
        for file in temporary.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)  # some writers allow only the owner
            if file.is_file():
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
            else:
                flush_names(file)
        temporary.chmod(0o777 & ~mask)
        flush_names(temporary)
        replace_folder(temporary, target)
        flush_names(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path, carried: bool = False) -> None:
    """Rename `source` to `target`, then remove the previous folder, or rename it if it contains files of others that
    were not `carried` over."""
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=marked(target, "old"), dir=target.parent))
    try:
        target.rename(old / target.name)
        source.rename(target)
    finally:
        put_back(old, target, carried)


def put_back(old: Path, target: Path, carried: bool = False) -> None:
    """Finish or undo an interrupted `replace_folder`."""
    if (old / target.name).is_dir() and not target.exists():
        (old / target.name).rename(target)
    elif (old / target.name).is_dir() and not carried:
        keep_others(old / target.name, target)
    shutil.rmtree(old, ignore_errors=True)


def has_own_card(folder: Path) -> bool:
    """Whether a result has a card that people wrote or changed."""
    return (folder / CARD).is_file() and not is_ours(folder / CARD, folder / SUMS)


def keep_others(folder: Path, target: Path) -> None:
    """Remove a replaced folder, or move what is not ours in it beside the new one, but for the card, which is there."""
    if has_own_card(folder) and same(folder / CARD, target / CARD):
        (folder / CARD).unlink()
    if not discard(folder):
        kept = free_name(target.with_name(f"{target.name}-kept"))
        folder.rename(kept)
        remark(f"Replaced {target}. Its files that litgpt did not write are now in {kept}.")


def free_name(path: Path) -> Path:
    """The path itself, or with a number appended if it exists."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists() and not name.is_symlink())
