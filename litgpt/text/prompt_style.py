"""How messages become text: the interface of prompt styles, and the clock of those that print the time."""

import datetime
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Optional, Union

from litgpt.errors import UserError, nearest

Message = Mapping[str, Any]  # `role` and `content`; the user message of an instruction row may have an `input`

NOW = "LITGPT_NOW"  # the environment variable that sets the clock of the templates


def now() -> datetime.datetime:
    """The time that chat templates print: that of `clock_at`, else the local time.

    Raises:
        UserError: The environment variable does not hold a time.
    """
    value = os.environ.get(NOW)
    try:
        return datetime.datetime.fromisoformat(value) if value else datetime.datetime.now()
    except ValueError as e:
        raise UserError(f"{NOW}={value} is not a time. Write it as 2026-01-31 or 2026-01-31T12:00:00.") from e


@contextmanager
def clock_at(time: Optional[str] = None) -> Iterator[None]:
    """Let chat templates print one fixed time within the block, in this process and in those that it starts.

    Args:
        time: In ISO format; by default the time at which the block begins.
    """
    before = os.environ.get(NOW)
    os.environ[NOW] = time or now().isoformat(timespec="seconds")
    try:
        yield
    finally:
        del os.environ[NOW]
        if before is not None:
            os.environ[NOW] = before


class Rendered(NamedTuple):
    """A conversation as text.

    Args:
        text: The complete conversation.
        answers: The parts of each answer of the assistant, usually one: where it begins, where it or its stop token
            ends, and the index of its message.
    """

    text: str
    answers: list[tuple[int, int, int]]


def system_message(text: Optional[str]) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


class PromptStyle:
    """How messages become text. A custom style implements `apply`, for a single prompt, or `prompt`, for conversations.

    Attributes:
        name: Shown on the screen and recorded in `prompt_style.yaml`. Default: the name of the class.
        own_special_tokens: Whether the text includes BOS and the stop tokens. Otherwise the tokenizer adds BOS.
        named: The styles that `from_name` knows.
        models: A regular expression for the names of models that `from_config` gives this style.
    """

    named: ClassVar[dict[str, "PromptStyle"]] = {}
    name: str
    models: str = "(?!)"
    own_special_tokens: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    def __new__(cls, *args: Any, **kwargs: Any) -> "PromptStyle":
        if cls.apply is PromptStyle.apply and cls.prompt is PromptStyle.prompt:
            raise TypeError(f"{cls.__name__} implements neither apply nor prompt.")
        return super().__new__(cls)

    @classmethod
    def from_name(cls, prompt_style: str) -> "PromptStyle":
        """A named style, such as alpaca. Raises `UserError` for an unknown name."""
        known = PromptStyle.named
        if prompt_style not in known:
            hint = nearest(prompt_style, known)
            raise UserError(f"Unknown prompt style {prompt_style!r}.{hint} Known: {', '.join(known)}.")
        return known[prompt_style]

    @classmethod
    def from_config(cls, config: Any) -> "PromptStyle":
        """The style of a model, by the `name` of its `Config`; the style `none` for a base model."""
        return cls.from_model_name(config.name or "")

    @classmethod
    def from_model_name(cls, name: str) -> "PromptStyle":
        """The style of a model by its name or repository, in any case; the style `none` if it is not known."""
        known, name = PromptStyle.named, name.rpartition("/")[2]
        found = (style for style in known.values() if re.search(style.models, name, re.IGNORECASE))
        return next(found, known["none"])

    def apply(
        self, prompt: Union[str, Sequence[Message]], *, sys_prompt: Optional[str] = None, input: str = "", **row: Any
    ) -> str:
        """The text that the answer to a prompt, or to the last of several messages, follows. Other columns of a row are
        accepted for custom styles."""
        if not isinstance(prompt, str):
            opening = not prompt or prompt[0]["role"] != "system"
            return self.prompt([*system_message(sys_prompt if opening else None), *prompt])
        return self.prompt([*system_message(sys_prompt), {"role": "user", "content": prompt, "input": input}])

    def prompt(self, messages: Sequence[Message], tools: Optional[list] = None) -> str:
        """The text that the answer to the last message follows.

        Raises:
            UserError: The style implements only `apply`, and these messages are more than one prompt.
        """
        *opening, last = messages
        if tools or last["role"] != "user" or any(m["role"] != "system" for m in opening) or len(opening) > 1:
            raise UserError(
                f"The prompt style {self.name!r} implements only apply, for a single prompt. For conversations, "
                "implement prompt(messages, tools)"
            )
        fields = {"sys_prompt": opening[0]["content"]} if opening else {}
        fields |= {"input": last["input"]} if last.get("input") else {}
        return self.apply(last["content"], **fields)

    @property
    def single_turn(self) -> bool:
        """Whether the style shows one prompt only, without the conversation before it."""
        return type(self).prompt is PromptStyle.prompt

    def stop_tokens(self, tokenizer: Any) -> tuple[list[int], ...]:
        """The sequences of token IDs that end an answer. A custom style may implement it."""
        return ([tokenizer.eos_id],)

    def stop_ids(self, tokenizer: Any) -> frozenset[int]:
        """The single tokens among `stop_tokens`. Raises `UserError` if a sequence has several tokens."""
        sequences = [list(ids) for ids in self.stop_tokens(tokenizer)]
        if several := next((ids for ids in sequences if len(ids) > 1), None):
            raise UserError(
                f"The prompt style {self.name!r} stops at several tokens, {several}. Return single tokens, and pass "
                "the text to generate as stop."
            )
        return frozenset(i for ids in sequences for i in ids if i is not None)

    def render_row(
        self, messages: Sequence[Message], tools: Optional[list] = None, turn_end: Optional[str] = None
    ) -> Rendered:
        """Render a conversation that ends with an answer, and locate the assistant's answers. Used by training."""
        if not self.single_turn:
            raise UserError(f"The prompt style {self.name!r} cannot be trained with: it has no render_row.")
        prompt = self.prompt(messages[:-1], tools or messages[-1].get("tool_calls"))
        text = prompt + messages[-1]["content"]
        return Rendered(text, [(len(prompt), len(text), len(messages) - 1)])

    def turn_end(self, special_tokens: Collection[str]) -> Optional[str]:
        """The stop token that the style writes after an answer, if it differs from the tokenizer's EOS."""
        return None

    def with_variables(self, variables: Mapping[str, Any], strict: bool = False) -> "PromptStyle":
        """The style with what `chat_template_kwargs` passes to a chat template, such as {"enable_thinking": false}.

        Args:
            strict: Whether the template must use each of them.

        Raises:
            UserError: The style is not a template, or a variable cannot be set.
        """
        raise UserError(f"The prompt style {self.name} is not a chat template, so it has no {', '.join(variables)}.")

    def with_defaults(self, variables: Mapping[str, Any]) -> "PromptStyle":
        """The style whose template sets these variables unless it is told otherwise. Raises as `with_variables`."""
        return self.with_variables(variables)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def time_formats(self) -> list[str]:
        """The formats in which rendered texts contain the current time; empty for most styles."""
        return []

    def printed_times(self) -> list[str]:
        """The current time as rendered texts contain it: usually nothing or a date."""
        return [now().strftime(format) for format in self.time_formats]
