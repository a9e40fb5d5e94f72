"""Prompt styles: how the messages of a conversation become the text that a model reads.

A message is a dict with `role` and `content`; the user's message of an instruction row may have an `input` beside it.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from litgpt.errors import UserError, nearest
from litgpt.files import read_json

Message = Mapping[str, Any]
Piece = tuple[str, bool]  # text, and whether it is an answer
STYLE_FILE = "prompt_style.yaml"


@dataclass(frozen=True)
class NamedStyle:
    """A fixed text around the prompt; the answer follows it and ends with the tokenizer's EOS.

    Args:
        name: As in `--data.prompt_style`.
        plain: The text, with `{prompt}`.
        with_input: The text for a prompt that has an input, with `{prompt}` and `{input}`.
    """

    name: str
    plain: str
    with_input: str = ""
    own_special_tokens = False  # the tokenizer adds BOS, and the answer ends with EOS

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the answer to the last message follows.

        Raises:
            UserError: this style cannot render such messages.
        """
        if len(messages) != 1 or messages[0]["role"] != "user":
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"The prompt style {self.name!r} renders one message of a user, not {roles}.")
        prompt, extra = messages[0]["content"], messages[0].get("input", "")
        return self.with_input.format(prompt=prompt, input=extra) if extra else self.plain.format(prompt=prompt)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The whole conversation as text, cut where answers begin and end."""
        return [(self.prompt(messages[:-1]), False), (messages[-1]["content"], True)]


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's own template, rendered in the sandbox of jinja2 as `transformers` does.

    Args:
        template: The Jinja source.
        variables: What it may use beside the messages: `bos_token`, `eos_token`.
    """

    template: str
    variables: Mapping[str, str]
    name = "chat"
    own_special_tokens = True  # BOS and the stop tokens are part of the text

    @cached_property
    def compiled(self) -> Any:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        def tojson(x: Any, **options: Any) -> str:
            return json.dumps(x, **{"ensure_ascii": False, **options})

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateError as e:
            raise UserError(f"The chat template is not valid: {e}.") from e

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        import jinja2

        flat = [joined(m) for m in messages]
        try:
            return self.compiled.render(
                messages=flat, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.variables
            )
        except (jinja2.TemplateError, TypeError) as e:
            raise UserError(f"The chat template refuses these messages: {e}.") from e

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the answer to the last message follows."""
        return self.render(messages, add_generation_prompt=True)

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The whole conversation as text, cut where answers begin and end."""
        prompt, whole = self.prompt(messages[:-1]), self.render(messages, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError("The chat template does not continue its own prompt with the answer.")
        return [(prompt, False), (whole[len(prompt) :], True)]


PromptStyle = Union[NamedStyle, ChatTemplate]

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n"
STYLES = {
    style.name: style
    for style in (
        NamedStyle("none", "{prompt}", "{prompt}\n{input}"),
        NamedStyle(
            "alpaca",
            f"{_TASK}. {_ANSWER}### Response:\n",
            f"{_TASK}, paired with an input that provides further context. {_ANSWER}"
            "### Input:\n{input}\n\n### Response:\n",
        ),
    )
}


def joined(message: Message) -> dict[str, Any]:
    """A message whose `input`, if it has one, stands below its content."""
    rest = {k: v for k, v in message.items() if k != "input"}
    return {**rest, "content": f"{message['content']}\n\n{message['input']}"} if message.get("input") else rest


def named_style(name: str) -> NamedStyle:
    """Raises:
    UserError: there is no style of that name.
    """
    if name not in STYLES:
        raise UserError(f"Unknown prompt style {name!r}.{nearest(name, STYLES)} Known: {', '.join(STYLES)}.")
    return STYLES[name]


def checkpoint_template(folder: Path) -> Optional[ChatTemplate]:
    """The chat template of a model folder, if it has one."""
    fields = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    template: Any = fields.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several, each with a name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not template:
        return None
    tokens = {k: fields.get(k) or "" for k in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return ChatTemplate(template, {k: t["content"] if isinstance(t, dict) else t for k, t in tokens.items()})


def choose_style(name: str, folder: Path) -> PromptStyle:
    """The style that `--data.prompt_style` means for a checkpoint.

    Args:
        name: The name of a style; `chat` for the checkpoint's template; `auto` for that or, where it has none, alpaca.

    Raises:
        UserError: unknown, or `chat` where the checkpoint has no template.
    """
    if name not in ("auto", "chat"):
        return named_style(name)
    template = checkpoint_template(folder)
    if template is None and name == "chat":
        raise UserError(f"{folder} has no chat template; choose another --data.prompt_style: {', '.join(STYLES)}.")
    return template or STYLES["alpaca"]


def save_style(style: PromptStyle, folder: Path) -> None:
    """Write `prompt_style.yaml`."""
    fields: dict[str, Any] = {"prompt_style": style.name}
    if isinstance(style, ChatTemplate):
        fields |= {"template": style.template, "variables": dict(style.variables)}
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    (folder / STYLE_FILE).write_text(text, encoding="utf-8", newline="\n")


def load_style(folder: Path) -> PromptStyle:
    """The style for prompts to the model in `folder`: what it was trained with, else its chat template, else none.

    Raises:
        UserError: `prompt_style.yaml` is not of our making.
    """
    path = folder / STYLE_FILE
    if not path.is_file():
        return checkpoint_template(folder) or STYLES["none"]
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(fields, dict) and isinstance(fields.get("template"), str):
        return ChatTemplate(fields["template"], fields.get("variables") or {})
    if isinstance(fields, dict) and isinstance(fields.get("prompt_style"), str):
        return named_style(fields["prompt_style"])
    raise UserError(f"{path} does not name a prompt style.")
