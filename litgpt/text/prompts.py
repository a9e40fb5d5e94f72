"""Prompt styles: how the messages of a conversation become the text that a model reads.

A `PromptStyle` is either a checkpoint's own chat template (`ChatTemplate`) or a fixed text around the prompt
(`NamedStyle`).
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union, cast

import yaml

from litgpt.errors import UserError, nearest
from litgpt.storage.fields import SPECIAL_TOKENS
from litgpt.storage.files import TOKENIZER_BYTES, is_there, read_json, read_text, read_yaml
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.model_styles import model_name, style_named, style_of_model
from litgpt.text.prompt_style import PromptStyle
from litgpt.text.styles import CLASSES, PUBLIC, STYLES, ChatML, NamedStyle
from litgpt.text.token_fields import optional_json, special_token, token_fields, tokenizer_class

if TYPE_CHECKING:
    from litgpt.text.tokenizer import Tokenizer

STYLE_FILE = "prompt_style.yaml"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER, LEGACY, PROCESSOR = "tokenizer_config.json", "chat_template.json", "processor_config.json"
TEMPLATE_FIELDS = (TOKENIZER, LEGACY, PROCESSOR)  # files that may have templates as a field; two are of processors


def template_variables(folder: Path) -> dict[str, str]:
    """The special tokens of a model folder, for its chat template."""
    fields = token_fields(folder)
    kind = tokenizer_class(fields, optional_json(folder / "config.json").get("model_type"))
    return {name: text for name in SPECIAL_TOKENS if (text := special_token(fields, kind, name))}


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name, as `transformers` reads them: `default`, and maybe `tool_use` for
    conversations with tools."""
    return next(iter(template_places(folder).values()), {})


def template_places(folder: Path) -> dict[str, dict[str, str]]:
    """The chat templates by name in each file of a model folder that has some. Those that take precedence come
    first."""
    files = [folder / TEMPLATE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    names = {Path(TEMPLATE).stem: "default"}
    places: dict[str, Any] = {TEMPLATE: {names.get(f.stem, f.stem): read_text(f) for f in files if is_there(f)}}
    for name in TEMPLATE_FIELDS:
        template: Any = optional_json(folder / name).get("chat_template")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}
        places[name] = {"default": template} if isinstance(template, str) else template
    return {name: templates for name, templates in places.items() if templates}


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


def save_style(style: PromptStyle, folder: Path, tokenizer: "Tokenizer") -> None:
    """Write `prompt_style.yaml`, and the style as the chat template of the folder."""
    text = yaml.safe_dump(style_fields(style), sort_keys=False, allow_unicode=True)
    (folder / STYLE_FILE).write_text(text, encoding="utf-8", newline="\n")
    save_template(style, folder, tokenizer)


def save_template(style: PromptStyle, folder: Path, tokenizer: "Tokenizer") -> None:
    """Make a style the chat template of a model folder, as files and in `tokenizer_config.json`, so that other programs
    render prompts as in training. Other templates in the folder are removed, also if the style is written in Python. If
    the style is the folder's own template, those that come with it stay."""
    templates, places = jinja_templates(style, tokenizer), template_places(folder)
    found = next(iter(places.values()), {})
    if templates.items() <= found.items() and ("tool_use" in found) == ("tool_use" in templates):
        templates = found if templates else {}
    if places.get(TEMPLATE) != templates:
        shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
        (folder / TEMPLATE).unlink(missing_ok=True)
    for name, text in templates.items():
        if not re.fullmatch(r"[\w-]+", name):  # a name in a file of strangers may be a path
            continue
        file = folder / (TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    for name in TEMPLATE_FIELDS:
        path, own = folder / name, places.get(name, {} if name == TOKENIZER else templates)
        if own == templates or not path.is_file():
            continue
        if name == LEGACY:
            path.unlink()
            continue
        fields = {key: value for key, value in read_json(path).items() if key != "chat_template"}
        if name == TOKENIZER and templates:
            fields["chat_template"] = listed if len(listed) > 1 else templates["default"]
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def jinja_templates(style: PromptStyle, tokenizer: "Tokenizer", blank: bool = True) -> dict[str, str]:
    """A style as chat templates by name, as in `chat_templates`; empty if it is written in Python. `blank` as for
    `written_prefix`."""
    if isinstance(style, NamedStyle):
        return {"default": style.jinja(written_prefix(style, tokenizer, blank), tokenizer.eos_token or "")}
    if isinstance(style, ChatTemplate):
        return {"default": style.template} | ({"tool_use": style.for_tools.template} if style.for_tools else {})
    return {}


def written_prefix(style: NamedStyle, tokenizer: "Tokenizer", blank: bool) -> str:
    """What a template writes before the text of a style for the ids of `Tokenizer.encode`: what the tokenizer adds by
    itself, such as BOS, unless the style has it; and the blank that some tokenizers put before a text, but not after a
    special token. Without `blank`, that is left to the program, as llama.cpp puts it there too."""
    text, added = style.prompt([{"role": "user", "content": "a"}]), tokenizer.prefix
    expected = tokenizer.encode(text)
    same = (prefix for prefix in ("", added, f"{added} ") if tokenizer.encode(prefix + text, special=False) == expected)
    found = next(same, added)
    return found if blank else found.rstrip(" ")


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
