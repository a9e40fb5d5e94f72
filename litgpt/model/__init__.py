"""The model, in torch alone. `GPT` and `KVCache` are imported on first use, since `config` needs no torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.model.gpt import GPT
    from litgpt.model.kv_cache import KVCache

__all__ = ["GPT", "KVCache"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'litgpt.model' has no attribute {name!r}")
    return getattr(importlib.import_module(f"litgpt.model.{'gpt' if name == 'GPT' else 'kv_cache'}"), name)
