"""What a request may hold: OpenAI's fields, and a few more for drawing tokens.

A field that would change the answer and is not implemented is refused, by name; what only concerns OpenAI's own house
(`user`, `store`, ...) is taken and ignored.
"""

import json
import re
from typing import Annotated, Any, Literal, Optional, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from litgpt.serve.failure import Failure

IGNORED = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls "
    "prediction verbosity"
).split()
NEUTRAL: dict[str, tuple] = {  # fields that are not implemented, and the values that ask for nothing
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "reasoning_effort": ("none",),
}
MANY_FIELDS = 100
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON writes half a pair; a whole pair is a character
Share = Annotated[float, Field(ge=0, le=1)]
D = TypeVar("D", bound="SamplingParams")
T = TypeVar("T")
Quick = Annotated[list[T], Field(fail_fast=True)]  # a long list that is wrong is one error


def parse(schema: type[D], body: bytes, content_type: str) -> D:
    """What a body asks for. Raises `Failure` for what is not JSON, or not of this form."""
    kind = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.+\+)?json", kind):  # what a page of another site cannot send without asking
        raise Failure(
            400, "The body must be JSON, with the header Content-Type: application/json.", None, "invalid_body"
        )
    try:
        text = body.decode(json.detect_encoding(body))
        fields = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(fields, ensure_ascii=False).encode()
    except RecursionError:
        raise Failure(400, "The body is nested too deeply.", None, "invalid_body") from None
    except UnicodeEncodeError:
        raise Failure(400, "A text has half a surrogate pair, which is no text.", None, "invalid_body") from None
    except ValueError:  # also of bytes that are not Unicode, and of numbers with thousands of digits
        raise Failure(400, "The body is not JSON.", None, "invalid_body") from None
    try:
        return schema.model_validate(fields)
    except ValidationError as e:
        raise wrong_fields(e) from None


def wrong_fields(e: ValidationError) -> Failure:
    """All that is wrong with a body, in one line."""
    said, param = [], None
    for error in e.errors(include_url=False, include_context=False, include_input=False)[:8]:
        message = str(error["msg"]).removeprefix("Value error, ")
        place = [str(part) for part in error["loc"]]
        param = param or (".".join(place) or None)
        said.append(f"{'.'.join(place)[:80]}: {message}" if place else message)
    return Failure(400, "; ".join(said)[:1000] + ".", param and param[:80], "invalid_body")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def not_too_many(cls, fields: Any) -> Any:
        """Else each that is unknown would be an error of its own."""
        if isinstance(fields, dict) and len(fields) > MANY_FIELDS:
            raise ValueError(f"more than {MANY_FIELDS} fields")
        return fields


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # there is nothing to hide: lengths show on the same machine only


class SamplingParams(Strict):
    """What all requests share: the model, how tokens are drawn, and when to end."""

    model: Optional[Annotated[str, Field(max_length=4096)]] = None  # as long as a path can be
    max_tokens: Optional[Annotated[int, Field(ge=1)]] = None
    temperature: Optional[Annotated[float, Field(ge=0, le=100)]] = None
    top_p: Optional[Share] = None
    top_k: Optional[Annotated[int, Field(ge=1)]] = None
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Optional[Annotated[int, Field(ge=-(2**63), lt=2**64)]] = None
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(default=[], max_length=16)
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def without_the_rest(cls, fields: Any) -> Any:
        """Leave out what says nothing. Raises `ValueError` for what is not implemented."""
        if not isinstance(fields, dict):
            return fields
        given = {k: v for k, v in fields.items() if v is not None and k not in IGNORED}
        wrong = [k for k, allowed in NEUTRAL.items() if k in given and given.pop(k) not in allowed]
        if fields.get("tool_choice") == "none":
            given.pop("tools", None)
        if wrong:
            raise ValueError(f"not supported here: {', '.join(wrong)}")
        return given

    @field_validator("stop", mode="before")
    @classmethod
    def as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def top(self) -> Optional[int]:
        """For how many likely tokens at each place log-probabilities are wanted; None for none at all."""
        return None

    @property
    def length(self) -> Optional[int]:
        """Tokens of an answer, at most."""
        return self.max_tokens

    @property
    def n_prompts(self) -> int:
        return 1


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Passed(BaseModel):
    """A part of a message. Fields that are not named here are passed on to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")


class Function(Passed):
    name: str
    arguments: Any = ""  # as OpenAI's clients have it, a text of JSON


class ToolCall(Passed):
    id: Optional[str] = None
    type: Literal["function"] = "function"
    function: Function


class Message(Passed):
    """One message, also as clients return it, with null for what it does not have."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Union[str, Quick[TextPart], None] = None
    tool_calls: Optional[Quick[ToolCall]] = None
    tool_call_id: Optional[str] = None
    name: Optional[str] = None
    reasoning_content: Optional[str] = None

    @model_validator(mode="after")
    def has_words(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self


class Chat(SamplingParams):
    messages: Annotated[Quick[Message], Field(min_length=1)]
    max_completion_tokens: Optional[Annotated[int, Field(ge=1)]] = None
    logprobs: bool = False
    top_logprobs: Optional[Annotated[int, Field(ge=0, le=20)]] = None
    tools: Quick[dict[str, Any]] = []

    @model_validator(mode="after")
    def agrees(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs wants logprobs to be true")
        return self

    @property
    def top(self) -> Optional[int]:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length(self) -> Optional[int]:
        return self.max_completion_tokens or self.max_tokens


class Completion(SamplingParams):
    prompt: Union[str, Quick[str], Quick[int], Quick[Quick[int]]]
    logprobs: Optional[Annotated[int, Field(ge=0, le=20)]] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def one_kind(cls, value: Any) -> Any:
        """One message instead of four, where it is none of the kinds."""
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value or len(value) > 1_000_000:
            raise ValueError("a text, a list of texts, or token ids are wanted")
        flat = [i for part in value for i in part] if all(isinstance(part, list) for part in value) else value
        kinds = {type(item) for item in flat}
        if kinds not in ({str}, {int}) or (flat is not value and kinds == {str}) or (kinds == {int} and min(flat) < 0):
            raise ValueError("a text, a list of texts, or token ids are wanted")
        return value

    @property
    def prompts(self) -> list[Union[str, list[int]]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item,return-value]

    @property
    def n_prompts(self) -> int:
        return len(self.prompts)

    @property
    def top(self) -> Optional[int]:
        return self.logprobs


class Predict(SamplingParams):
    """LitGPT's own form."""

    prompt: str
    max_new_tokens: Optional[Annotated[int, Field(ge=1)]] = None

    @property
    def length(self) -> Optional[int]:
        return self.max_new_tokens or self.max_tokens
