"""Importing large libraries quickly."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For code that imports torch or Lightning: without Python's search for garbage it takes three quarters of the
    time. What was imported stays, and is left out of later searches."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
