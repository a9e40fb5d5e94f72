"""`litgpt data cache`"""

import time
from contextlib import suppress
from typing import Literal

from rich.console import Console
from rich.table import Table

from litgpt.data.cache import LIMIT, cache_files, cache_folder, cache_limit
from litgpt.data.tokens import cached_tokens


def main(action: Literal["list", "clear"] = "list") -> None:
    """List the tokens that earlier runs left for later ones, or clear them.

    They are in LITGPT_CACHE, by default ~/.cache/litgpt. If they exceed LITGPT_CACHE_GB (50), the files that were not
    used for the longest time are removed.

    Args:
        action: list or clear. After that, runs tokenize their rows again.
    """
    console, folder = Console(highlight=False, soft_wrap=True), cache_folder()
    table = Table(box=None, pad_edge=False)
    table.add_column("last used")
    for name in ("rows", "tokens", "MB"):
        table.add_column(name, justify="right")
    table.add_column("file", overflow="fold")
    total = n = 0
    for file in cache_files(folder):
        with suppress(OSError):  # another process may remove it
            found, size = file.stat(), file.stat().st_size
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.st_mtime))
            tokens = cached_tokens(file, is_used=False)
            sizes = [f"{len(tokens[0]):,}", f"{len(tokens[0].ids):,}"] if tokens else ["?", "?"]
            table.add_row(used, *sizes, f"{size / 1e6:,.1f}", file.stem)
            total, n = total + size, n + 1
            if action == "clear":
                file.unlink()
    if n:
        console.print(table)
    files = f"{n:,} file{'s' * (n != 1)} of {total / 1e6:,.1f} MB"
    limit = f"The limit is {cache_limit() / 1e9:g} GB ({LIMIT})."
    console.print(
        f"Removed {files} in {folder}." if action == "clear" else f"{files} in {folder}. {limit}", markup=False
    )
