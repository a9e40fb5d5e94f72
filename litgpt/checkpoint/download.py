"""Downloading a model from the Hugging Face hub, into a folder that is complete or does not exist.

`huggingface_hub` transfers the files to `NAME.partial` beside the folder. It compares no hashes, so complete files are
recognized here, by size and hash. They stay there if a download is killed, and the next one continues.
"""

import errno
import hashlib
import inspect
import itertools
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NoReturn, Optional

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from litgpt.checkpoint.hub import CHECKPOINTS, offline, repositories
from litgpt.checkpoint.model_card import CARD, LEGAL
from litgpt.errors import BUGS, UserError, nearest, without_secrets
from litgpt.storage.fields import TEXT, Shape, misfit
from litgpt.storage.files import flush_names, link, read_json, same
from litgpt.storage.http import SILENCE, checked_token
from litgpt.storage.outputs import SINGLE, entry, is_ours, listed, marked, put_back, replace_folder, write_singles
from litgpt.text.prompts import MORE_TEMPLATES
from litgpt.text.tokenizer import FILES as TOKENIZER_FILES

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first kind that a repository has is downloaded
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")  # likewise for an adapter
SHARD = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
TRIES = 3  # for each file, after the library's own
WAITS = 5  # how often to wait when the server asks for it
PATIENCE = 3  # seconds for transfers to end when they are stopped
WORKERS = 8
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, with its size in bytes and its hash."""

    name: str  # its path in the repository
    size: int
    sha256: Optional[str]  # of a large file
    blob_id: Optional[str]  # Git's hash of a small one

    def is_complete(self, path: Path) -> bool:
        """Whether a file on the disk is this one, byte for byte."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if not (self.sha256 or self.blob_id):  # the server sends no hash
            return True
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with open(path, "rb") as f:
            while part := f.read(1 << 20):
                digest.update(part)
        return digest.hexdigest() == (self.sha256 or self.blob_id)


@dataclass
class Repository:
    """A repository at one commit, and how to get its files."""

    repo_id: str
    token: Optional[str]
    commit: str = ""
    files: tuple[RemoteFile, ...] = ()

    @property
    def endpoint(self) -> str:
        return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def open(self, revision: Optional[str]) -> None:
        """Get the commit and the list of its files. Raises `UserError` if this is not possible."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token=self.token)
        for n in itertools.count(1):
            try:
                info = api.model_info(self.repo_id, revision=revision, files_metadata=True, timeout=SILENCE)
                files = info.siblings or []
                listed = [(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in files]
                break
            except BUGS as e:  # raised in the library by a malformed answer
                raise self.odd_answer(repr(e)) from e
            except Exception as e:
                if n > WAITS or status_of(e) not in (429, 500, 502, 503, 504):
                    self.explain(e, revision)
                seconds = waiting_time(e, n)
                say(f"{self.endpoint} asks to wait. Retrying in {seconds} s ({n} of {WAITS}).")
                time.sleep(seconds)
        if wrong := misfit(info.sha, TEXT, "sha") or next(filter(None, map(wrong_entry, listed)), None):
            raise self.odd_answer(wrong)
        self.commit = info.sha or ""
        self.files = tuple(RemoteFile(name, size or 0, sha256, blob_id) for name, size, sha256, blob_id in listed)

    def odd_answer(self, what: str) -> UserError:
        return UserError(f"{self.endpoint} sent an answer about {self.repo_id} that is not a hub's: {what}")

    def fetch(self, file: RemoteFile, folder: Path, stop: threading.Event) -> None:
        """Download a file to a folder. An incomplete file is removed. Raises `UserError` if it cannot be downloaded, or
        arrives twice with another hash."""
        from huggingface_hub import hf_hub_download

        path, wrong, failed = folder / file.name, 0, 0
        options: dict[str, Any] = {"endpoint": self.endpoint, "token": self.token, "local_dir": folder}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # older versions lack it
            options["tqdm_class"] = stopper(stop)
        while not stop.is_set():
            try:
                hf_hub_download(self.repo_id, file.name, revision=self.commit, force_download=wrong > 0, **options)
            except Exception as e:
                path.unlink(missing_ok=True)
                failed += 1
                if failed == TRIES or not is_transient(e):
                    self.explain(e, self.commit, file.name)
                continue
            if file.is_complete(path):
                return
            path.unlink(missing_ok=True)
            wrong += 1
            if wrong == 2:
                raise UserError(
                    f"{file.name} of {self.repo_id} arrived twice with another hash than {self.endpoint} lists. "
                    "Something on the way changes it. Try again later, or from another network."
                )

    def explain(self, error: BaseException, revision: Optional[str], file: str = "") -> NoReturn:
        """Raise a `UserError` that says in one line what an error of the library means."""
        from huggingface_hub import errors, get_token

        error = origin(error)
        what, page = f"{file} of {self.repo_id}" if file else self.repo_id, f"{self.endpoint}/{self.repo_id}"
        status, number = status_of(error), getattr(error, "errno", None)
        token = self.token or get_token()
        pass_token = f"pass a token from {self.endpoint}/settings/tokens with --access_token or in HF_TOKEN"
        if isinstance(error, errors.GatedRepoError):
            message = f"{self.repo_id} is a gated model. Accept the license at {page}, then {pass_token}."
            if token:
                message = f"{self.repo_id} is a gated model, and your token has no access yet. Request it at {page}."
        elif isinstance(error, errors.RevisionNotFoundError):
            message = f"{self.repo_id} has no revision {revision!r}. See {page}/commits/main."
        elif status == 404 and file:
            message = f"{what} is listed, but missing. Try again later."
        elif status == 401 and "Invalid credentials" in str(error):
            message = f"{self.endpoint} rejects the token that was sent for {what}. To continue, {pass_token}."
        elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            hint = nearest(self.repo_id, repositories())
            private = "your token has no access to it" if token else pass_token
            message = f"{self.endpoint} has no model {self.repo_id}.{hint} If it is private, {private}."
        elif status == 403:
            message = (
                f"Access to {what} is denied {'to this' if token else 'without a'} token. See {page}, or {pass_token}."
            )
        elif status == 429:
            message = f"{self.endpoint} refuses {what} because of too many requests. Try again in a few minutes."
        elif status is not None:
            message = f"{self.endpoint} returned error {status} for {what}. Try again later."
        elif number in NO_ROOM:
            message = f"The disk is full: {what} does not fit. Free some space, or pass another --checkpoint_dir."
        elif isinstance(error, PermissionError):
            message = f"Cannot write to {error.filename}. Pass another --checkpoint_dir."
        elif isinstance(error, BUGS):
            raise error
        else:
            reason = " ".join(str(error).split()).split(" If HF_ENDPOINT")[0] or type(error).__name__
            reason = reason.replace(token, "***") if token else reason
            message = f"Cannot download {what} from {self.endpoint}: {reason[:200].rstrip('.')}. Check the network."
        raise UserError(message) from error


def download(
    repo_id: str,
    checkpoint_dir: Path = CHECKPOINTS,
    revision: Optional[str] = None,
    access_token: Optional[str] = None,
    tokenizer_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Download the files of a model that litgpt needs, and return their folder, `checkpoint_dir/ORG/NAME`.

    An existing folder is compared with the repository. Only files that differ are downloaded, those that have changed
    since then only with `overwrite`; other files stay. The options are those of `litgpt download`.

    Raises:
        UserError: it cannot be downloaded. Complete files stay in `NAME.partial` for the next try.
    """
    target = checkpoint_dir / repo_id
    target = target.resolve() if target.is_symlink() else target
    if offline():
        if (target / "config.json").is_file():
            say(f"Using {target} without comparing it with the hub, because HF_HUB_OFFLINE is set.")
            return target
        raise UserError(
            f"Cannot download {repo_id} because HF_HUB_OFFLINE is set. Unset it, or copy the folder to {target}."
        )
    quiet_library()
    repository = Repository(repo_id, checked_token(access_token or os.environ.get("HF_TOKEN") or "") or None)
    repository.open(revision)
    names = needed_files(repository, tokenizer_only)
    partial = target.with_name(f"{target.name}.partial")
    with alone(target):
        try:
            partial.mkdir(exist_ok=True)
            tidy(partial, names)
            n_fetched = fetch_files(repository, names, partial, target, overwrite)
            stale = [p for p in target.glob("*") if SHARD.fullmatch(p.name) and p.name not in names]
            refuse_changed([] if overwrite or tokenizer_only else stale, target)
            if n_fetched or not all(same(partial / name, target / name) for name in names):
                finish(partial, target, names, tokenizer_only)
                files = [p for p in target.iterdir() if p.is_file()]
                size = sum(p.stat().st_size for p in files)
                say(f"Downloaded {repo_id} to {target}: {len(files)} files, {in_words(size)}.")
            else:
                shutil.rmtree(partial)
                say(f"{repo_id} is already complete in {target}.")
        except OSError as e:
            repository.explain(e, revision)
        finally:
            tidy(partial, names)
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()
    return target


def wrong_entry(entry: tuple) -> Optional[str]:
    """What is wrong with a hub's entry for a file: name, size, SHA-256 and Git's hash."""
    shapes: dict[str, Shape] = {"rfilename": str, "size": (range(2**53), None), "sha256": TEXT, "blobId": TEXT}
    wrong = (misfit(value, shape, name) for value, (name, shape) in zip(entry, shapes.items()))
    return next(filter(None, wrong), None)


def needed_files(repository: Repository, tokenizer_only: bool) -> set[str]:
    """The names of the files to download, without the shards, which an index lists. Raises `UserError` if the
    repository has no weights in a supported form."""
    there = {file.name for file in repository.files}
    names = {"config.json", *TOKENIZER_FILES} & there
    names |= {name for name in there if re.fullmatch(rf"{MORE_TEMPLATES}/[\w-]+\.jinja", name)}
    if tokenizer_only and not names - {"config.json", "generation_config.json"}:
        raise UserError(f"{repository.repo_id} has no tokenizer files.")
    names |= {name for name in there if name == CARD or LEGAL.fullmatch(name)}  # results take over the license
    if tokenizer_only:
        return names
    kind = next((w for w in WEIGHTS if {w, f"{w}.index.json"} & there), None)
    if kind is not None:
        return names | {f"{kind}.index.json" if f"{kind}.index.json" in there else kind}
    adapter = next((w for w in ADAPTER if w in there), None)
    if adapter is not None and "adapter_config.json" in there:
        return names - {"config.json"} | {"adapter_config.json", adapter}
    ends = sorted({Path(n).suffix for n in there if Path(n).suffix in (".gguf", ".onnx", ".pth", ".msgpack", ".h5")})
    others = f" It has {', '.join(ends)} files, which are not supported." if ends else ""
    raise UserError(f"{repository.repo_id} has no model.safetensors and no pytorch_model.bin.{others}")


def fetch_files(repository: Repository, names: set[str], partial: Path, target: Path, overwrite: bool) -> int:
    """Put all files into `partial`, and return how many were downloaded; complete ones in `target` are linked. An index
    comes first and adds its shards to `names`."""
    by_name = {file.name: file for file in repository.files}
    indices = [by_name[n] for n in names if n.endswith(".index.json")]
    n_fetched = fetch_missing(repository, indices, partial, target, overwrite)
    for index in indices:
        shards = set(read_json(partial / index.name)["weight_map"].values())
        outside = [shard for shard in shards if Path(shard).name != shard or shard == ".."]
        if outside or not shards or not shards <= by_name.keys():
            raise UserError(f"{index.name} of {repository.repo_id} lists files that the repository does not have.")
        names |= shards
    return n_fetched + fetch_missing(repository, [by_name[n] for n in sorted(names)], partial, target, overwrite)


def refuse_changed(files: Iterable[Path], target: Path) -> None:
    """Raise `UserError` if a file to replace was not downloaded here, or has changed since."""
    changed = [str(path) for path in files if path.exists() and not is_ours(path, target / SINGLE)]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since the download, and different from the hub. To replace it, pass "
            "--overwrite true."
        )


def fetch_missing(repository: Repository, files: list[RemoteFile], partial: Path, target: Path, overwrite: bool) -> int:
    """Download the files that are complete neither in `partial` nor in `target`, several at once, with a bar."""
    missing = []
    for file in files:
        if not file.is_complete(partial / file.name):
            (partial / file.name).unlink(missing_ok=True)
            (partial / file.name).parent.mkdir(exist_ok=True)
            if file.is_complete(target / file.name):
                link(target / file.name, partial / file.name)
            else:
                missing.append(file)
    refuse_changed([] if overwrite else [target / file.name for file in missing], target)
    if not missing:
        return 0
    size, room = sum(file.size for file in missing), shutil.disk_usage(partial).free
    if size > room:
        raise UserError(
            f"{repository.repo_id} needs {in_words(size)}, but only {in_words(room)} are free at {partial.parent}. "
            "Free some space, or pass another --checkpoint_dir."
        )
    kept = f", {len(files) - len(missing)} files are here already" if len(files) > len(missing) else ""
    say(f"Downloading {repository.repo_id} at {repository.commit[:8]}: {len(missing)} files, {in_words(size)}{kept}")
    with bar(missing, size, partial) as show:
        fetch_in_parallel(repository, missing, partial, show)
    return len(missing)


def fetch_in_parallel(
    repository: Repository, files: list[RemoteFile], folder: Path, show: Callable[[Optional[RemoteFile]], None]
) -> None:
    """Download several files at once. Calls `show` for each file when it is there, and with None from time to time.

    The first error, or an interruption, stops all of them, without waiting for a thread that does not react.
    """
    waiting = iter(sorted(files, key=lambda f: f.size, reverse=True))  # each thread takes the next one
    results: queue.SimpleQueue[RemoteFile | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def worker() -> None:
        try:
            for file in waiting:
                repository.fetch(file, folder, stop)
                results.put(file)
        except BaseException as e:
            results.put(e)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(WORKERS, len(files)))]
    for thread in threads:
        thread.start()
    try:
        n_left = len(files)
        while n_left:
            result = None
            with suppress(queue.Empty):
                result = results.get(timeout=0.3)
            if isinstance(result, BaseException):
                raise result
            n_left -= result is not None
            show(result)
    finally:
        stop.set()
        until = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))


def stopper(stop: threading.Event) -> type:
    """A progress bar for the library that is invisible and ends the transfer when `stop` is set."""
    from tqdm import tqdm

    class Stopper(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: Optional[float] = 1) -> None:
            if stop.is_set():
                raise InterruptedError("The download was stopped.")

    return Stopper


@contextmanager
def bar(files: list[RemoteFile], size: int, folder: Path) -> Iterator[Callable[[Optional[RemoteFile]], None]]:
    """A bar of the bytes on the disk; without a terminal, a line for each complete file."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda file: say(f"{file.name} ({in_words(file.size)})") if file else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(f"{len(files)} files", total=size)

        def show(file: Optional[RemoteFile]) -> None:
            parts = [folder / f.name for f in files]
            parts += (folder / ".cache").rglob("*.incomplete")
            progress.update(task, completed=sum(size_of(part) for part in parts))

        yield show


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Wait until no other process downloads to the same folder, and restore what a killed one had moved away."""
    new = [folder for folder in (target.parent, target.parent.parent) if not folder.exists()]
    file = target.with_name(f".{target.name}.lock")
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"Waiting for another process that is downloading to {target}.")
            lock.acquire()
    except OSError as e:
        raise UserError(f"Cannot write to --checkpoint_dir {target.parent.parent}: {e.strerror}.") from e
    try:
        for moved in target.parent.glob(f"{escape(marked(target, 'old'))}*"):
            put_back(moved, target, carried=True)
        yield
    finally:
        with suppress(OSError):  # whoever waits checks whether the file still exists
            file.unlink()
        lock.release()
        with suppress(OSError):  # unless it is in use
            for folder in new:
                folder.rmdir()


def tidy(partial: Path, names: Iterable[str]) -> None:
    """Remove what the library keeps beside the files, and files that are not needed. Shards may be."""
    needed = set(names)
    for path in partial.iterdir() if partial.is_dir() else ():
        if path.is_dir():
            if path.name != MORE_TEMPLATES:
                shutil.rmtree(path, ignore_errors=True)
        elif path.name not in needed and not SHARD.fullmatch(path.name):
            path.unlink()


def finish(partial: Path, target: Path, names: set[str], tokenizer_only: bool) -> None:
    """Move the folder to its place. Existing files stay unless they are files of the model that were requested."""
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    for path in [path for path in partial.rglob("*") if path.is_file()]:
        if path.relative_to(partial).as_posix() not in names:  # shards of another revision
            path.unlink()
        else:
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
    for path in target.iterdir() if target.is_dir() else ():
        replaced = path.name in names or (SHARD.fullmatch(path.name) and not tokenizer_only)
        if path.name == SINGLE:
            continue
        if path.is_dir():
            shutil.copytree(path, partial / path.name, copy_function=link_missing, dirs_exist_ok=True)
        elif not replaced:
            link(path, partial / path.name)
    known = {partial / path.relative_to(target): several for path, several in listed(target / SINGLE).items()}
    write_singles(partial / SINGLE, known | {partial / name: [entry(partial / name, crc=False)] for name in names})
    flush_names(partial)
    replace_folder(partial, target, carried=True)
    flush_names(target.parent)


def link_missing(source: Any, target: Any) -> None:
    if not os.path.exists(target):
        link(source, target)


def quiet_library() -> None:
    """Silence the library's warnings, which are many lines. What matters is reported here."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()


def origin(error: BaseException) -> BaseException:
    """The error behind the library's `LocalEntryNotFoundError`, or behind its `ValueError` for a forced download."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, (LocalEntryNotFoundError, ValueError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> Optional[int]:
    """The HTTP status that an error is about, if it is."""
    return getattr(getattr(origin(error), "response", None), "status_code", None)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help: the connection broke, or a file ended too early. If it cannot connect or is told to
    wait, the library itself retries."""
    if status_of(error) is not None or origin(error) is not error:
        return False
    return not isinstance(error, OSError) or (error.errno not in NO_ROOM and not isinstance(error, PermissionError))


def waiting_time(error: BaseException, n: int) -> int:
    """Seconds to wait before try `n + 1`: what the server asks for, up to five minutes, or else longer each time."""
    asked = origin(error).response.headers.get("Retry-After", "")  # type: ignore[attr-defined]
    return min(int(asked), 300) if re.fullmatch(r"[0-9]{1,9}", asked) else 2**n


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # renamed meanwhile
        return 0


def in_words(size: int) -> str:
    """A number of bytes with a unit, like 1.2 GB."""
    for n, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= n:
            return f"{size / n:.1f} {unit}"
    return f"{size} bytes"


def say(message: str) -> None:
    print(f"litgpt: {without_secrets(message)}", file=sys.stderr, flush=True)
