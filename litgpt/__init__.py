"""litgpt: finetune open language models from a shell."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Libraries that we use report home unless told not to. Nothing is reported; a user's own setting wins.
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # of datasets, at every load of one
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}.items():
    os.environ.setdefault(_name, _value)

_WHERE = {  # public names, imported on first use so that `litgpt -h` starts without torch
    "Config": "litgpt.model.config",
    "GPT": "litgpt.model",
    "LLM": "litgpt.api",
    "PromptStyle": "litgpt.text.prompts",
    "Tokenizer": "litgpt.text.tokenizer",
    "UserError": "litgpt.errors",
}
__all__ = [*_WHERE, "__version__"]

importlib.import_module("litgpt.litgpt_format.names")  # lets LitGPT's names of modules be imported


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'litgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
