"""The bodies of requests: OpenAI's fields, and more sampling parameters.

An unsupported field that would change the answer is refused by name. Fields that concern OpenAI's own service (`user`,
`store`, ...) are ignored.
"""

import json
import re
from typing import Annotated, Any, Literal, Optional, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from litgpt.errors import UserError
from litgpt.generate.inference_model import InferenceModel
from litgpt.serve.failure import Failure

IGNORED = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls "
    "prediction verbosity"
).split()
NEUTRAL: dict[str, tuple] = {  # unsupported fields, and the values that change nothing
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
MAX_FIELDS = 100
TRAINING_FIELDS = ("input", "train")  # of messages in training data; clients that send them mean something else
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the first half of a surrogate pair in JSON
Share = Annotated[float, Field(ge=0, le=1)]
D = TypeVar("D", bound="SamplingParams")
T = TypeVar("T")
FailFast = Annotated[list[T], Field(fail_fast=True)]  # one error for a long list


def parse(schema: type[D], body: bytes, content_type: str) -> D:
    """Validate a body. Raises `Failure` if it is not JSON or does not match the schema."""
    kind = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(.+\+)?json", kind):  # a page of another site cannot send it without permission
        raise invalid("The body must be JSON, with the header Content-Type: application/json.")
    try:
        text = body.decode(json.detect_encoding(body))
        fields = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(fields, ensure_ascii=False).encode()
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    except UnicodeEncodeError:
        raise invalid("A string contains half a surrogate pair, which is not text.") from None
    except ValueError:  # also for bytes that are not Unicode, and for numbers with thousands of digits
        raise invalid("The body is not JSON.") from None
    try:
        return schema.model_validate(fields)
    except ValidationError as e:
        raise wrong_fields(e) from None


def invalid(message: str, param: Optional[str] = None) -> Failure:
    return Failure(400, message, param, "invalid_body")


def wrong_fields(e: ValidationError) -> Failure:
    """All errors of a body in one line."""
    messages, param = [], None
    for error in e.errors(include_url=False, include_context=False, include_input=False)[:8]:
        message = str(error["msg"]).removeprefix("Value error, ")
        field = ".".join(map(str, error["loc"]))
        param = param or field or None
        messages.append(f"{field[:80]}: {message}" if field else message)
    return invalid("; ".join(messages)[:1000] + ".", param and param[:80])


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def not_too_many(cls, fields: Any) -> Any:
        """Otherwise each unknown field would be a separate error."""
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields")
        return fields


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored


class SamplingParams(Strict):
    """Fields of all requests: the model, how tokens are sampled, and when to stop."""

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
    def drop_neutral(cls, fields: Any) -> Any:
        """Drop fields without effect. Raises `ValueError` for unsupported ones."""
        if not isinstance(fields, dict):
            return fields
        given = {k: v for k, v in fields.items() if v is not None and k not in IGNORED}
        wrong = [k for k, allowed in NEUTRAL.items() if k in given and given.pop(k) not in allowed]
        if fields.get("tool_choice") == "none":
            given.pop("tools", None)
        if wrong:
            raise ValueError(f"not supported: {', '.join(wrong)}")
        return given

    @field_validator("stop", mode="before")
    @classmethod
    def as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def n_logprobs(self) -> Optional[int]:
        """How many of the most likely tokens to return with log-probabilities; None for no log-probabilities."""
        return None

    @property
    def max_length(self) -> Optional[int]:
        """The most tokens of an answer."""
        return self.max_tokens

    @property
    def n_prompts(self) -> int:
        return 1

    def token_ids(self, model: InferenceModel) -> list[list[int]]:
        """The prompts. Raises `UserError` if the model cannot read them."""
        raise NotImplementedError


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class TemplateFields(BaseModel):
    """A part of a message. Unknown fields are passed on to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    def present(self) -> dict[str, Any]:
        """All fields that are not null."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in {**named, **(self.model_extra or {})}.items() if value is not None}


class Function(TemplateFields):
    name: str
    arguments: Any = ""  # JSON text, in OpenAI's API


class ToolCall(TemplateFields):
    id: Optional[str] = None
    type: Literal["function"] = "function"
    function: Function


class Message(TemplateFields):
    """A message. Clients send back the server's own with null for missing fields."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Union[str, FailFast[TextPart], None] = None
    tool_calls: Optional[FailFast[ToolCall]] = None
    tool_call_id: Optional[str] = None
    name: Optional[str] = None
    reasoning_content: Optional[str] = None

    @model_validator(mode="after")
    def has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message for the chat template: the text of all parts, and its other fields without the empty ones."""
        fields = {k: v for k, v in self.present().items() if v != [] and k not in TRAINING_FIELDS}
        if self.tool_calls:
            fields["tool_calls"] = [{**c.present(), "function": c.function.present()} for c in self.tool_calls]
        fields["role"] = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, str):
            fields["content"] = "".join(part.text for part in self.content or ())
        return fields


class Chat(SamplingParams):
    messages: Annotated[FailFast[Message], Field(min_length=1)]
    max_completion_tokens: Optional[Annotated[int, Field(ge=1)]] = None
    logprobs: bool = False
    top_logprobs: Optional[Annotated[int, Field(ge=0, le=20)]] = None
    tools: FailFast[dict[str, Any]] = []
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False  # go on with the answer in the last message, as in vLLM

    @model_validator(mode="after")
    def check_logprobs(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        return self

    def token_ids(self, model: InferenceModel) -> list[list[int]]:
        messages, begun = [message.for_template() for message in self.messages], ""
        if self.continue_final_message:
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise UserError("continue_final_message: the last message must be an answer of the assistant")
            begun = messages.pop()["content"]
        limit = model.model.config.block_size
        return [model.render(messages, self.tools or None, limit, self.chat_template_kwargs, begun)[1]]

    @property
    def n_logprobs(self) -> Optional[int]:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_length(self) -> Optional[int]:
        return self.max_completion_tokens or self.max_tokens


class Completion(SamplingParams):
    prompt: Union[str, FailFast[str], FailFast[int], FailFast[FailFast[int]]]
    logprobs: Optional[Annotated[int, Field(ge=0, le=20)]] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def one_kind(cls, value: Any) -> Any:
        """One error instead of one for each member of the union."""
        if isinstance(value, str):
            return value
        expected = ValueError("expected a string, a list of strings, or token ids")
        if not isinstance(value, list) or not value or len(value) > 1_000_000:
            raise expected
        nested = all(isinstance(part, list) for part in value)
        flat = [i for part in value for i in part] if nested else value
        kinds = {type(item) for item in flat}
        if not ((kinds == {str} and not nested) or (kinds == {int} and min(flat) >= 0)):
            raise expected
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
    def n_logprobs(self) -> Optional[int]:
        return self.logprobs

    def token_ids(self, model: InferenceModel) -> list[list[int]]:
        tokenizer, limit = model.tokenizer, model.model.config.block_size
        for prompt in self.prompts:
            if not isinstance(prompt, str) and prompt and (largest := max(prompt)) >= tokenizer.vocab_size:
                raise UserError(
                    f"The prompt has the token id {largest}; the tokenizer's ids are below {tokenizer.vocab_size}."
                )
        found = [tokenizer.encode(p, limit=limit) if isinstance(p, str) else p for p in self.prompts]
        for ids in found:
            tokenizer.check(ids)
        return found


class Predict(SamplingParams):
    """LitGPT's own API."""

    prompt: str
    max_new_tokens: Optional[Annotated[int, Field(ge=1)]] = None

    @property
    def max_length(self) -> Optional[int]:
        return self.max_new_tokens or self.max_tokens

    def token_ids(self, model: InferenceModel) -> list[list[int]]:
        messages = [{"role": "user", "content": self.prompt}]
        return [model.render(messages, None, model.model.config.block_size)[1]]
