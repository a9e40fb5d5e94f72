"""What commands write, and what of it a later command may remove: nothing but files that a list of ours names and that
have not changed since.

A folder that is written as a whole has `checksums.json`, which lists all of its files. Files that are written one by
one, where other files may be too, are listed in `.litgpt.json` beside them. Both hold the size, the CRC-32 and the time
of modification of each file.
"""

import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, Optional

from filelock import FileLock, Timeout

from litgpt.errors import UserError, remark
from litgpt.storage.files import current_umask, flush_names, home, read_json, write_text

SUMS, SINGLE = "checksums.json", ".litgpt.json"
NAMED = 3  # files that a message names
Entry = list[int]  # size in bytes, CRC-32, nanoseconds


# lists of files


def entry(path: Path, crc: bool = True) -> Entry:
    """What a list holds of a file; without its CRC-32, a copy of the file is not taken for it."""
    stat = path.stat()
    return [stat.st_size, checksum(path) if crc else -1, stat.st_mtime_ns]


def checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def unchanged(path: Path, then: Entry) -> bool:
    """Whether a file is as it was when it was listed. A copy of it is, too."""
    stat = path.stat()
    if stat.st_size != then[0]:
        return False
    return stat.st_mtime_ns in then[2:] or checksum(path) == then[1]


def write_sums(folder: Path, **more: Any) -> None:
    """List all files of a folder in its `checksums.json`; `more` stands there too."""
    files = {p.relative_to(folder).as_posix(): entry(p) for p in sorted(files_below(folder)) if p.name != SUMS}
    (folder / SUMS).write_text(json.dumps({**more, "files": files}, indent=1) + "\n", encoding="utf-8")


def listed(file: Path) -> dict[Path, list[Entry]]:
    """The files that a list names, each with what it may look like; nothing where the list is not one of ours."""
    try:
        found = read_json(file)["files"]
    except UserError:
        return {}
    several = {file.parent / name: e if e and isinstance(e[0], list) else [e] for name, e in found.items()}
    return {path: entries for path, entries in several.items() if all(len(e) in (2, 3) for e in entries)}


def is_ours(path: Path, file: Optional[Path] = None) -> bool:
    """Whether a single file is unchanged since it was listed: beside it, or in another list."""
    known = listed(file or path.with_name(SINGLE)).get(path, [])
    return path.is_file() and not path.is_symlink() and any(unchanged(path, then) for then in known)


def put_single(temporary: Path, path: Path) -> None:
    """Move a finished file to its place and list it there. The list goes on to name the former file, so that a kill
    between the two steps leaves one that is known."""
    known = listed(path.with_name(SINGLE))
    known[path] = [entry(temporary), *known.get(path, [])][:2]
    write_singles(path.with_name(SINGLE), known)
    os.replace(temporary, path)
    flush_names(path.parent)


def write_singles(file: Path, known: dict[Path, list[Entry]]) -> None:
    names = {path.relative_to(file.parent).as_posix(): several for path, several in known.items()}
    write_text(file, json.dumps({"files": names}, indent=1) + "\n")


def write_single(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, and list it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_text(temporary, text)
    put_single(temporary, path)


def files_below(folder: Path) -> Iterator[Path]:
    """Every file and every link in a folder and below. Links are not followed."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in files)
        yield from (Path(place, name) for name in folders if Path(place, name).is_symlink())


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder that are listed and unchanged, and all others. Lists of ours belong to the former."""
    known: dict[Path, list[Entry]] = {}
    lists = set()
    for path in files_below(folder):
        if path.name in (SUMS, SINGLE) and (found := listed(path)):
            known |= found
            lists.add(path)
    ours: list[Path] = []
    others: list[Path] = []
    for path in sorted(files_below(folder)):
        same = not path.is_symlink() and any(unchanged(path, then) for then in known.get(path, []))
        (ours if same or path in lists else others).append(path)
    return ours, others


def discard(folder: Path) -> bool:
    """Remove the files of ours from a folder, and the folder once it is empty. Returns whether it is gone."""
    ours, _ = split(folder)
    for path in ours:
        path.unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # something else is in it
            os.rmdir(place)
    return not folder.exists()


# where a command may write


def check_place(out: Path, sources: Iterable[Path] = (), option: str = "--out_dir") -> None:
    """Raise `UserError` for a folder that no command writes its results to.

    Args:
        sources: Files and folders that the command reads.
        option: The option that names the folder.
    """
    place = out.resolve()
    taken = {"the current folder": Path.cwd(), **{str(source): source.resolve() for source in sources}}
    if (own := home()) is not None:
        taken["your home folder"] = own
    for what, path in taken.items():
        if place in (path, *path.parents):
            raise UserError(f"{option} {out} {'is' if place == path else 'holds'} {what}. Choose another folder.")
    if (place / ".git").exists():
        raise UserError(f"{option} {out} is a git repository. Choose another folder.")
    above = next(p for p in (out, *out.parents) if p.exists() or p.is_symlink())
    if not above.is_dir():
        raise UserError(f"{option} {out}: {above} is not a folder. Choose another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{option} {out}: {above} is not writable. Choose another folder.")


def check_replaceable(
    out: Path, overwrite: Optional[bool], sources: Iterable[Path] = (), option: str = "--out_dir"
) -> None:
    """Raise `UserError` unless a folder may take the place of `out`: nothing is there, or what is there is all of our
    making and `overwrite` is set (None where the command has no such option). Other arguments as for `check_place`."""
    check_place(out, sources, option)
    if not out.exists() or not any(out.iterdir()):
        return
    refuse_others(out, split(out)[1], option)
    if not overwrite:
        more = ", or pass --overwrite true" if overwrite is False else ""
        raise UserError(f"{option} {out} is not empty. Choose another folder{more}.")


def check_file(out: Path, overwrite: bool, option: str) -> None:
    """Raise `UserError` unless a file may be replaced: it is of our making, or `overwrite` is set."""
    if out.is_dir():
        raise UserError(f"{option} {out} is a folder. Name a file.")
    if out.exists() and not overwrite and not is_ours(out):
        raise UserError(f"{option} {out} exists and litgpt did not write it. Choose another, or pass --overwrite true.")


def refuse_others(out: Path, others: list[Path], option: str = "--out_dir") -> None:
    """Raise `UserError` where files that are not ours are in the way."""
    if others:
        names = ", ".join(str(path) for path in others[:NAMED]) + (", ..." if len(others) > NAMED else "")
        raise UserError(
            f"{option} {out} has files in the way that litgpt did not write, or that changed since: {names}. Choose "
            "another folder, or move them."
        )


# writing


@contextmanager
def exclusive(out: Path, option: str = "--out_dir") -> Iterator[None]:
    """Keep other commands from writing to the same file or folder. What a killed one left beside it is removed, or put
    back where it was about to be replaced.

    Raises:
        UserError: another process is writing there.
    """
    place = out.resolve()
    with locked(place.with_name(f".{place.name}.lock"), f"{option} {out}"):
        tidy(place)
        yield


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards. Raises `UserError` if another process holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0)
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


def tidy(out: Path) -> None:
    """Remove what a killed `new_folder` left beside a folder, or undo what it had not finished."""
    for path in out.parent.glob(f"{escape(marked(out, 'old'))}*"):
        put_back(path, out)
    for path in out.parent.glob(f"{escape(marked(out, 'new'))}*"):
        shutil.rmtree(path, ignore_errors=True)


def marked(out: Path, what: str) -> str:
    """The beginning of the name of a temporary folder."""
    return f".{out.name}.litgpt-{what}-"


@contextmanager
def new_folder(target: Path, sums: bool = True) -> Iterator[Path]:
    """A temporary folder beside `target` to write into; it takes the place of `target` when all went well.

    Args:
        sums: Whether its files are listed in it, unless they are already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=marked(target, "new"), dir=target.parent))
    try:
        yield temporary
        if sums and not (temporary / SUMS).exists():
            write_sums(temporary)
        mask = current_umask()
        for file in temporary.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)  # some writers make theirs for the owner alone
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
    """Rename `source` to `target`. What was there is removed once the new folder is in place; a folder that holds
    anything else than files of ours gets another name instead.

    Args:
        carried: Whether the new folder has those files too.
    """
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=marked(target, "old"), dir=target.parent))
    try:
        target.rename(old / target.name)
        source.rename(target)
    except BaseException:
        put_back(old, target)
        raise
    if not carried:
        keep_others(old / target.name, target)
    shutil.rmtree(old, ignore_errors=True)


def put_back(old: Path, target: Path, carried: bool = False) -> None:
    """End a `replace_folder` that did not come to its end, here or in a process that was killed."""
    if (old / target.name).is_dir() and not target.exists():
        (old / target.name).rename(target)
    elif (old / target.name).is_dir() and not carried:
        keep_others(old / target.name, target)
    shutil.rmtree(old, ignore_errors=True)


def keep_others(folder: Path, target: Path) -> None:
    """Remove a folder that was replaced; what is not ours in it is put beside the new one."""
    if not discard(folder):
        kept = free_name(target.with_name(f"{target.name}-kept"))
        folder.rename(kept)
        remark(f"{target} was replaced; the files in it that litgpt did not write are in {kept}.")


def free_name(path: Path) -> Path:
    """The path itself, or with a number behind it if the name is taken."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists() and not name.is_symlink())
