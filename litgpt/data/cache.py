"""The folder of token files, which earlier runs left for later ones."""

import atexit
import math
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from litgpt.errors import UserError
from litgpt.storage.files import cache_place

LIMIT, DEFAULT_GB = "LITGPT_CACHE_GB", 50.0  # the environment variable with the size of the cache, and its default


def cache_folder() -> Path:
    """The folder of token files, in `LITGPT_CACHE` or `~/.cache/litgpt`; temporary if that is not writable."""
    place = cache_place()
    if place is not None:
        folder = place / "tokens"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return temporary_cache()


@cache
def temporary_cache() -> Path:
    folder = tempfile.mkdtemp(prefix="litgpt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cache_files(folder: Path) -> list[Path]:
    """The token files in the folder, the one that was used last at the end."""
    found = []
    for file in folder.glob("*.safetensors"):
        with suppress(OSError):  # another process may remove it
            found.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(found)]


def cache_limit() -> float:
    """The size of the cache in bytes. Raises `UserError` if the environment variable does not hold a number."""
    text = os.environ.get(LIMIT) or str(DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise UserError(f"{LIMIT}={text} is not a number of gigabytes.")
    return limit * 1e9


def shrink_cache(used: Path, limit: float) -> None:
    """Remove the files that were not used for the longest time until the cache is within its limit.

    Args:
        used: A file that stays.
        limit: In bytes.
    """
    sizes = {}
    for file in cache_files(used.parent):
        with suppress(OSError):
            sizes[file] = file.stat().st_size
    excess = sum(sizes.values()) - limit
    for file, size in sizes.items():
        if excess > 0 and file != used:
            with suppress(OSError):
                file.unlink()
                excess -= size
