"""The prompt styles of models that have no chat template, by the names of the models."""

from functools import cache
from pathlib import Path
from typing import Optional

from litgpt.errors import UserError, remark
from litgpt.storage.files import is_there, read_yaml
from litgpt.text.prompt_style import PromptStyle
from litgpt.text.styles import STYLES

CHECKPOINTS, LIT_CONFIG = "checkpoints", "model_config.yaml"


def style_named(model: str) -> Optional[PromptStyle]:
    """The style that a model was trained with, by its name or repository, as LitGPT knows it; None if unknown."""
    style = PromptStyle.from_model_name(model)
    return None if style is STYLES["none"] else style


def model_name(folder: Path) -> str:
    """The name in LitGPT's `model_config.yaml`, or that of a folder `checkpoints/ORG/NAME`; empty for others."""
    if is_there(folder / LIT_CONFIG):
        try:
            return str(read_yaml(folder / LIT_CONFIG).get("name") or "")
        except UserError:
            return ""
    parts = folder.resolve().parts
    return parts[-1] if parts[-3:-2] == (CHECKPOINTS,) else ""


def style_of_model(folder: Path) -> Optional[PromptStyle]:
    """The style of the model in a folder by its name, with a remark on stderr the first time; None if unknown."""
    style = style_named(model_name(folder))
    if style is not None:
        report(model_name(folder), style.name)
    return style


@cache
def report(model: str, style: str) -> None:
    remark(f"{model} has no chat template. Using the prompt style {style} that it was trained with.")
