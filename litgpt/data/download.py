"""Downloads of data sets."""

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
    """Download `url` to `target`, unless that exists. The file appears complete or not at all.

    Args:
        url: The address.
        target: The path of the file.
        token: Access token, sent to this server only.
        hint: A sentence for the error message.

    Raises:
        UserError: The download failed. The message says where to put the file by hand.
    """
    if target.is_file():
        return target
    remark(f"downloading {url} to {target}")
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
            f"Cannot download {url}: {reason_of(e)}. {hint}{' ' if hint else ''}Put the file at {target} by hand."
        ) from e
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return target


def hub_url(repository: str, file: str) -> str:
    """The URL of a data set's file on the Hugging Face hub, or on the hub that `HF_ENDPOINT` names."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/datasets/{repository}/resolve/main/{file}"


def placed(folder: Path, stem: str) -> Optional[Path]:
    """The file of that name in `folder`, if any."""
    return next((p for end in (".parquet", ".json", ".jsonl") if (p := folder / (stem + end)).is_file()), None)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .tar.gz archive into `folder`, unless that exists. Links are skipped.

    Raises:
        UserError: The archive is broken, or has a file outside the folder.
    """
    if folder.is_dir():
        return folder
    remark(f"unpacking {archive} to {folder}")
    try:
        with tarfile.open(archive, "r:gz") as tar, new_folder(folder, sums=False) as temporary:
            for member in tar:
                target = (temporary / member.name).resolve()
                if not target.is_relative_to(temporary.resolve()):
                    raise UserError(f"{archive} is not safe: its file {member.name!r} is outside {folder}.")
                source = tar.extractfile(member) if member.isfile() else None
                if source is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(target, "wb") as f:
                        shutil.copyfileobj(source, f, 1 << 20)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise UserError(f"Cannot unpack {archive}: {e}. Remove the file to download it again.") from e
    return folder
