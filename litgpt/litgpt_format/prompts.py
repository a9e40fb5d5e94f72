"""LitGPT's module `litgpt.prompts`: the prompt styles as classes, and the file of a folder that names one."""

from pathlib import Path
from typing import Any, Union

import yaml

from litgpt.storage.files import is_there
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompt_style import PromptStyle as PromptStyle
from litgpt.text.prompts import STYLE_FILE, class_fields, load_style, style_fields
from litgpt.text.styles import CLASSES, STYLES

prompt_styles: dict[str, type[PromptStyle]] = {name: type(style) for name, style in STYLES.items()}
__all__ = [
    "PromptStyle",
    "has_prompt_style",
    "load_prompt_style",
    "model_name_to_prompt_style",
    "prompt_styles",
    "save_prompt_style",
    *CLASSES,
]


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module 'litgpt.prompts' has no attribute {name!r}")
    return CLASSES[name]


def model_name_to_prompt_style(model_name: str) -> PromptStyle:
    """The style that a model of this name was trained in; `Default` for a base model."""
    return PromptStyle.from_model_name(model_name)


def has_prompt_style(checkpoint_dir: Path) -> bool:
    return is_there(Path(checkpoint_dir) / STYLE_FILE)


def save_prompt_style(style: Union[str, PromptStyle], checkpoint_dir: Path) -> None:
    """Write `prompt_style.yaml` with the class of a style, or with its template if it is a chat template."""
    made = PromptStyle.from_name(style) if isinstance(style, str) else style
    fields = style_fields(made) if isinstance(made, ChatTemplate) else class_fields(made)
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    (Path(checkpoint_dir) / STYLE_FILE).write_text(text, encoding="utf-8", newline="\n")


def load_prompt_style(checkpoint_dir: Path) -> PromptStyle:
    """The style that `prompt_style.yaml` names. A class of your own must be in a module that is imported already.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: It does not name a style.
    """
    path = Path(checkpoint_dir) / STYLE_FILE
    if not is_there(path):
        raise FileNotFoundError(f"{path} does not exist.")
    return load_style(path.parent)
