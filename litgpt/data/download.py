"""Fetching the files of a data set, once."""

import os
import shutil
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Optional

from litgpt.errors import UserError, remark
from litgpt.storage.files import part_of
from litgpt.storage.http import open_url, reason_of
from litgpt.storage.outputs import new_folder


def fetch(url: str, target: Path, token: Optional[str] = None, hint: str = "") -> Path:
    """The file `target`, fetched from `url` unless it is there already. It appears whole or not at all.

    Args:
        url: Where it is published.
        target: Where it is kept.
        token: For a server that wants to know who asks; it is sent to no other one.
        hint: A sentence for the message if the file cannot be fetched.

    Raises:
        UserError: it cannot be fetched; the message says where to put it by hand.
    """
    if target.is_file():
        return target
    remark(f"fetching {url} to {target}")
    part: Optional[Path] = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        with open_url(url, token) as response, open(part, "wb") as f:
            shutil.copyfileobj(response, f, 1 << 20)
            expected = response.headers.get("Content-Length")
            if expected and str(f.tell()) != expected.strip():
                raise HTTPException(f"the connection ended after {f.tell():,} of {expected} bytes")
        os.replace(part, target)
    except (OSError, HTTPException, ValueError) as e:
        raise UserError(
            f"Cannot fetch {url}: {reason_of(e)}. {hint}{' ' if hint else ''}Put it at {target} by hand."
        ) from e
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return target


def hub_url(repository: str, file: str) -> str:
    """Where a file of a data set lies on the Hugging Face hub, or on the one that `HF_ENDPOINT` names."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/datasets/{repository}/resolve/main/{file}"


def placed(folder: Path, stem: str) -> Optional[Path]:
    """The file of that name that somebody put into `folder`, if any."""
    return next((p for end in (".parquet", ".json", ".jsonl") if (p := folder / (stem + end)).is_file()), None)


def unpack(archive: Path, folder: Path) -> Path:
    """The folder with the files of a .tar.gz archive, unpacked unless it is there already. Links are passed over.

    Raises:
        UserError: the archive is broken, or a name in it leads out of the folder.
    """
    if folder.is_dir():
        return folder
    remark(f"unpacking {archive} to {folder}")
    try:
        with tarfile.open(archive, "r:gz") as tar, new_folder(folder, sums=False) as temporary:
            for member in tar:
                target = (temporary / member.name).resolve()
                if not target.is_relative_to(temporary.resolve()):
                    raise UserError(f"{archive} is not safe: its file {member.name!r} would lie outside {folder}.")
                source = tar.extractfile(member) if member.isfile() else None
                if source is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(target, "wb") as f:
                        shutil.copyfileobj(source, f, 1 << 20)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise UserError(f"Cannot unpack {archive}: {e}. If it is broken, remove it; then it is fetched again.") from e
    return folder
