"""Runs the functions of a file of behaviors in any Python."""

import traceback
from collections.abc import Mapping
from typing import Any


def main(names: Mapping[str, Any]) -> None:
    """Run each function whose name starts with test_, and print `NAME ok` or `NAME FAILED: REASON`."""
    for name, function in list(names.items()):
        if not name.startswith("test_"):
            continue
        try:
            function()
            print(f"{name} ok", flush=True)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            print(f"{name} FAILED: {reason} (line {where.lineno} of {where.filename})", flush=True)
