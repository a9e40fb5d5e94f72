"""Prompt styles: how the messages of a conversation become the text that a model reads.

A `PromptStyle` is either a checkpoint's own chat template (`ChatTemplate`) or a fixed text around the prompt
(`NamedStyle`).
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union, cast

import yaml

from litgpt.errors import UserError, nearest
from litgpt.storage.fields import SPECIAL_TOKENS
from litgpt.storage.files import TOKENIZER_BYTES, is_there, read_json, read_text, read_yaml
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.model_styles import model_name, style_named, style_of_model
from litgpt.text.prompt_style import PromptStyle
from litgpt.text.styles import CLASSES, PUBLIC, STYLES, ChatML, NamedStyle
from litgpt.text.token_fields import optional_json, special_token, token_fields, tokenizer_class

STYLE_FILE = "prompt_style.yaml"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


def template_variables(folder: Path) -> dict[str, str]:
    """The special tokens of a model folder, for its chat template."""
    fields = token_fields(folder)
    kind = tokenizer_class(fields, optional_json(folder / "config.json").get("model_type"))
    return {name: text for name in SPECIAL_TOKENS if (text := special_token(fields, kind, name))}


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name, as `transformers` reads them: `default`, and maybe `tool_use` for
    conversations with tools. Files take precedence over `tokenizer_config.json`."""
    files = [folder / TEMPLATE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    found = {file.stem: read_text(file) for file in files if is_there(file)}
    if found:
        return {"default" if name == Path(TEMPLATE).stem else name: template for name, template in found.items()}
    fields = read_json(folder / "tokenizer_config.json") if is_there(folder / "tokenizer_config.json") else {}
    template: Any = fields.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}
    return template if isinstance(template, dict) else {"default": template} if template else {}


def checkpoint_template(folder: Path) -> Optional[ChatTemplate]:
    """The chat template of a model folder, if it has one."""
    return make_template(chat_templates(folder), template_variables(folder))


def make_template(
    templates: Mapping[str, str], variables: Mapping[str, str], name: str = "chat"
) -> Optional[ChatTemplate]:
    if "default" not in templates:
        return None
    for_tools = ChatTemplate(templates["tool_use"], variables, name) if "tool_use" in templates else None
    return ChatTemplate(templates["default"], variables, name, for_tools)


def chatml(folder: Path) -> ChatTemplate:
    """ChatML for a checkpoint without a template. Turns end with `<|im_end|>` if that is a token, else with EOS."""
    variables = template_variables(folder)
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")]
    tokens = "".join(read_text(file, TOKENIZER_BYTES) for file in files if is_there(file))
    end = "<|im_end|>" if '"<|im_end|>"' in tokens else variables.get("eos_token", "<|im_end|>")
    source = Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source.replace("TURN_END", json.dumps(end, ensure_ascii=False)), variables, name="chatml")


def choose_style(name: Union[str, PromptStyle], folder: Path, chat: bool = False) -> PromptStyle:
    """The style that `--data.prompt_style` selects for a checkpoint.

    Args:
        name: A style, or `auto` for the style that the checkpoint was trained with, else its template, else the style
            that is known by the model's name (for conversations only if it has turns), else chatml for conversations
            and alpaca for instruction rows. `chat` for the template; `chatml`; a named style; or the path of a Jinja
            template.
        folder: The checkpoint.
        chat: Whether the rows are conversations.

    Raises:
        UserError: The style is unknown, or it is `chat` and the checkpoint has no template.
    """
    if isinstance(name, PromptStyle):
        return name
    if name in STYLES:
        return STYLES[name]
    if name == "chatml":
        return chatml(folder)
    if name == "auto" and is_there(folder / STYLE_FILE):
        return load_style(folder)
    if name in ("auto", "chat"):
        template = checkpoint_template(folder)
        if template is None and name == "chat":
            raise UserError(f"{folder} has no chat template. Pass another --data.prompt_style, such as chatml.")
        if template is not None:
            return template
        by_name = style_named(model_name(folder))
        has_turns = not isinstance(by_name, NamedStyle) or by_name.close is not None
        if by_name is not None and (has_turns or not chat):
            return style_of_model(folder) or by_name
        return chatml(folder) if chat else STYLES["alpaca"]
    if Path(name).is_file():
        return ChatTemplate(read_text(Path(name)), template_variables(folder), name=Path(name).name)
    known = ("auto", "chat", "chatml", *STYLES)
    raise UserError(
        f"--data.prompt_style {name!r} is not a style or a file.{nearest(name, known)} Known: {', '.join(known)}."
    )


def style_fields(style: PromptStyle) -> dict[str, Any]:
    """The content of `prompt_style.yaml`, which is enough to restore the style."""
    fields: dict[str, Any] = {"prompt_style": style.name}
    if not isinstance(style, ChatTemplate) and style is not STYLES.get(style.name):
        fields = class_fields(style)
    if isinstance(style, ChatTemplate):
        fields |= {"template": style.template, "variables": dict(style.variables)}
        fields |= {"tool_use": style.for_tools.template} if style.for_tools else {}
    return fields


def save_style(style: PromptStyle, folder: Path, bos: str, eos: str) -> None:
    """Write `prompt_style.yaml`, and the style as the chat template of the folder.

    Args:
        bos: What the tokenizer adds before a text by itself.
        eos: The token that ends answers if the style writes none.
    """
    text = yaml.safe_dump(style_fields(style), sort_keys=False, allow_unicode=True)
    (folder / STYLE_FILE).write_text(text, encoding="utf-8", newline="\n")
    save_template(style, folder, bos, eos)


def save_template(style: PromptStyle, folder: Path, bos: str, eos: str) -> None:
    """Make a style the chat template of a model folder, so that other programs render prompts as in training. Other
    templates in the folder are removed; an identical one is kept. Arguments as for `save_style`."""
    templates = jinja_templates(style, bos, eos)
    if not templates:
        return
    found = chat_templates(folder)
    if templates.items() <= found.items() and ("tool_use" in found) == ("tool_use" in templates):
        return
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    (folder / TEMPLATE).write_text(templates["default"], encoding="utf-8", newline="\n")
    if "tool_use" in templates:
        (folder / MORE_TEMPLATES).mkdir()
        (folder / MORE_TEMPLATES / "tool_use.jinja").write_text(templates["tool_use"], encoding="utf-8", newline="\n")
    config = folder / "tokenizer_config.json"
    if config.is_file():  # for programs that do not read the files
        listed = [{"name": name, "template": template} for name, template in templates.items()]
        fields = read_json(config) | {"chat_template": listed if len(listed) > 1 else templates["default"]}
        config.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def jinja_templates(style: PromptStyle, bos: str, eos: str) -> dict[str, str]:
    """A style as chat templates by name, as in `chat_templates`; empty if it is written in Python. Arguments as for
    `save_style`."""
    if isinstance(style, NamedStyle):
        return {"default": style.jinja(bos, eos)}
    if isinstance(style, ChatTemplate):
        return {"default": style.template} | ({"tool_use": style.for_tools.template} if style.for_tools else {})
    return {}


def load_style(folder: Path) -> PromptStyle:
    """The style for prompts to a model: what it was trained with, else its chat template, else the one that is known by
    the model's name, else none.

    Raises:
        UserError: `prompt_style.yaml` does not name a style.
    """
    path = folder / STYLE_FILE
    if not is_there(path):
        return checkpoint_template(folder) or style_of_model(folder) or STYLES["none"]
    fields = read_yaml(path)
    name = fields.get("prompt_style")
    if name is not None and fields.get("template") is not None:
        tools = fields.get("tool_use")
        templates = {"default": fields["template"]} | ({"tool_use": tools} if tools is not None else {})
        return cast(ChatTemplate, make_template(templates, fields.get("variables") or {}, name))
    if name in STYLES:
        return STYLES[name]
    if class_path := fields.get("class_path"):
        return style_of_class(class_path, fields.get("init_args") or {}, path)
    raise UserError(f"{path} does not name a prompt style.")


def class_fields(style: PromptStyle) -> dict[str, Any]:
    """The content of `prompt_style.yaml` in LitGPT's form, for a style that is a class."""
    system = style.system_message if isinstance(style, ChatML) else None
    arguments = {"init_args": {"system_message": system}} if system != getattr(type(style), "system", None) else {}
    return {"class_path": f"{type(style).__module__}.{type(style).__qualname__}", **(arguments if system else {})}


def style_of_class(class_path: str, arguments: dict[str, Any], path: Path) -> PromptStyle:
    """The style of a class of LitGPT, or of one in a module that the program has imported.

    Args:
        class_path: The module and the name of the class.
        arguments: Passed to the class.
        path: The file that names it, for errors.

    Raises:
        UserError: There is no such class.
    """
    module, _, name = class_path.rpartition(".")
    found = CLASSES.get(name) if module == PUBLIC else getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, PromptStyle)):
        hint = nearest(name, CLASSES) if module == PUBLIC else f" Import {module} first." if module else ""
        raise UserError(f"{path}: {class_path} is not a prompt style that is imported.{hint}")
    if module == PUBLIC and found.name in STYLES and not arguments:
        return STYLES[found.name]
    try:
        return found(**arguments)
    except TypeError as e:
        raise UserError(f"{path}: {class_path} cannot be made with {arguments or 'no arguments'}.") from e
