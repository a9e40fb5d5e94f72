"""litgpt: finetune open language models from a shell."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Turn off the telemetry of libraries, unless the user has set these variables.
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # of `datasets`
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}.items():
    os.environ.setdefault(_name, _value)

_MODULES = {  # public names and their modules, imported on first use so that `litgpt -h` starts without torch
    "Config": "litgpt.litgpt_format.config",
    "GPT": "litgpt.litgpt_format.model",
    "LLM": "litgpt.api",
    "PromptStyle": "litgpt.text.prompts",
    "Tokenizer": "litgpt.litgpt_format.tokenizer",
    "UserError": "litgpt.errors",
}
__all__ = [*_MODULES, "__version__"]

_OTHER_NAMES = importlib.import_module("litgpt.litgpt_format.names").MODULES  # makes LitGPT's module names importable


def __getattr__(name: str) -> Any:
    if f"litgpt.{name}" in _OTHER_NAMES or name in ("api", "data", "model"):  # LitGPT imports these with `litgpt`
        return importlib.import_module(f"litgpt.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'litgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
