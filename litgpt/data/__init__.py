"""Data sets and files: from rows to token ids to batches without padding.

From Python, the data sets are `lightning.LightningDataModule`s as well, imported on first use. The command line uses
the same names within `inner_classes`, where they are the classes of this room, which do not need Lightning.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

PUBLIC = "litgpt.compat.data"
MODULES = {  # the data sets, and the modules of their inner classes
    **dict.fromkeys(
        ("FLAN", "LIMA", "Alpaca", "Alpaca2k", "AlpacaGPT4", "Deita", "Dolly", "LongForm", "TinyStories"),
        "litgpt.data.named",
    ),
    "JSON": "litgpt.data.json_file",
    "PicoPairs": "litgpt.data.pico",
    "PicoSums": "litgpt.data.pico",
    "PicoText": "litgpt.data.pico",
    "TextFiles": "litgpt.data.documents",
}
PYTHON_ONLY = ("LitData", "MicroLlama", "OpenWebText", "SFTDataset", "TinyLlama", "get_sft_collate_fn")
__all__ = ["DataModule", *MODULES, *PYTHON_ONLY]

use_inner = ContextVar("use_inner", default=False)


@contextmanager
def inner_classes() -> Iterator[None]:
    """Within this context, `litgpt.data.JSON` is the inner class."""
    token = use_inner.set(True)
    try:
        yield
    finally:
        use_inner.reset(token)


def inner_class(name: str) -> type:
    """The inner class of a data set."""
    return getattr(importlib.import_module(MODULES[name]), name)


def __getattr__(name: str) -> Any:
    if use_inner.get() and name == "DataModule":
        return importlib.import_module("litgpt.data.data_module").DataModule
    if use_inner.get() and name in MODULES:
        return inner_class(name)
    if name not in __all__:
        raise AttributeError(f"module 'litgpt.data' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC), name)
