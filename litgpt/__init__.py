"""litgpt: finetune open language models from a shell."""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {  # public names, imported on first use so that `litgpt -h` starts without torch
    "Config": "litgpt.config",
    "GPT": "litgpt.model",
    "Tokenizer": "litgpt.tokenizer",
    "UserError": "litgpt.errors",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'litgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
