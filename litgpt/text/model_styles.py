"""The prompt styles of models that have no chat template, by the names of the models."""

import re
from functools import cache
from pathlib import Path
from typing import Optional

from litgpt.errors import UserError, remark
from litgpt.storage.files import is_there, read_yaml
from litgpt.text.styles import STYLES, NamedStyle

CHECKPOINTS, LIT_CONFIG = "checkpoints", "model_config.yaml"
NAMES = (  # a style of styles.yaml, and a pattern of the names of its models, in any case; the first match wins
    ("stablelm-alpha", "stablelm-tuned-alpha"),
    ("stablelm-zephyr", "stablelm-zephyr-3b"),
    ("stablecode", "stablecode-instruct"),
    ("falcon", "falcon-.*instruct"),
    ("llama2-function-calling", "llama-2-7b-chat-hf-function-calling-v2"),
    ("llama2", "llama-2.*-chat"),
    ("llama3", "llama-3.*-instruct|olmo-2.*-(instruct|sft|dpo)"),
    ("freewilly2", "freewilly2"),
    ("platypus", "platypus"),
    ("codellama", "codellama|mi[sx]tral.*instruct"),
    ("phi-1", "phi-1(?!\\d)"),
    ("phi-2", "phi-2(?!\\d)"),
    ("phi-3", "phi-3"),
    ("phi-4-reasoning", "phi-4-reasoning"),
    ("phi-4-mini-reasoning", "phi-4-mini-reasoning"),
    ("phi-4-mini", "phi-4-mini"),
    ("phi-4", "phi-4"),
    ("tinyllama", "tiny-?llama.*chat"),
    ("gemma", "gemma.*-it"),
    ("olmo", "olmo.*-hf"),
    ("qwen2.5-math", "qwen2\\.5-math"),
    ("qwen2.5", "qwen2\\.5-"),
    ("qwq", "qwq-"),
    ("qwen3", "qwen3-"),
    ("smollm2", "smollm2.*-instruct"),
    ("salamandra", "salamandra-.*-instruct"),
)


def style_named(model: str) -> Optional[NamedStyle]:
    """The style that a model was trained with, by its name or repository, as LitGPT knows it; None if unknown."""
    found = (style for style, pattern in NAMES if re.search(pattern, model.rpartition("/")[2], re.IGNORECASE))
    return next((STYLES[style] for style in found), None)


def model_name(folder: Path) -> str:
    """The name in LitGPT's `model_config.yaml`, or that of a folder `checkpoints/ORG/NAME`; empty for others."""
    if is_there(folder / LIT_CONFIG):
        try:
            return str(read_yaml(folder / LIT_CONFIG).get("name") or "")
        except UserError:
            return ""
    parts = folder.resolve().parts
    return parts[-1] if parts[-3:-2] == (CHECKPOINTS,) else ""


def style_of_model(folder: Path) -> Optional[NamedStyle]:
    """The style of the model in a folder by its name, with a remark on stderr the first time; None if unknown."""
    style = style_named(model_name(folder))
    if style is not None:
        report(model_name(folder), style.name)
    return style


@cache
def report(model: str, style: str) -> None:
    remark(f"{model} has no chat template. Using the prompt style {style} that it was trained with.")
