"""Responses in the format of OpenAI (https://platform.openai.com/docs/api-reference) and in that of LitGPT."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any, Optional

from starlette.responses import JSONResponse, Response, StreamingResponse

from litgpt.serve.failure import Failure
from litgpt.serve.worker import Delta, Generation, Token

Fields = dict[str, Any]
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ResponseFormat:
    """The format of one response of OpenAI's API, to chat completions or to completions."""

    def __init__(self, chat: bool, generation: Generation) -> None:
        self.chat, self.model, self.tokenizer = chat, generation.model, generation.tokenizer
        self.with_logprobs = generation.logprobs
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.kind = "chat.completion" if chat else "text_completion"
        self.chunk_kind = "chat.completion.chunk" if chat else self.kind

    def envelope(self, choices: Sequence[Fields], kind: str, **more: Any) -> Fields:
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**fields, "choices": choices, **more}

    def complete(self, answers: Sequence[Sequence[Delta]], usage: Fields) -> Fields:
        """The complete response, from the parts of each answer."""
        choices = []
        for i, deltas in enumerate(answers):
            text, tokens = "".join(d.text for d in deltas), [token for d in deltas for token in d.tokens]
            message = {"role": "assistant", "content": text, "refusal": None}
            content: Fields = {"message": message} if self.chat else {"text": text}
            choices.append(choice(i, content, self.logprobs(tokens), deltas[-1].finish if deltas else None))
        return self.envelope(choices, self.kind, usage=usage)

    def first_chunks(self, n: int) -> list[Fields]:
        """The chunks before the first token of each of `n` answers."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self.chunk(choice(i, {"delta": delta})) for i in range(n if self.chat else 0)]

    def chunks(self, delta: Delta) -> list[Fields]:
        """A chunk for the text, and another one for the end."""
        found = []
        if delta.text or (self.with_logprobs and delta.tokens):
            content: Fields = {"delta": {"content": delta.text}} if self.chat else {"text": delta.text}
            found.append(choice(delta.index, content, self.logprobs(delta.tokens)))
        if delta.finish:
            found.append(choice(delta.index, {"delta": {}} if self.chat else {"text": ""}, finish=delta.finish))
        return [self.chunk(each) for each in found]

    def chunk(self, *choices: Fields, **more: Any) -> Fields:
        return self.envelope(choices, self.chunk_kind, **more)

    def logprobs(self, tokens: Sequence[Token]) -> Optional[Fields]:
        if not self.with_logprobs:
            return None
        if self.chat:
            content = [
                {**self.entry(t.id, t.logprob), "top_logprobs": [self.entry(*pair) for pair in t.top]} for t in tokens
            ]
            return {"content": content, "refusal": None}
        texts = [self.token_text(t.id) for t in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self.token_text(i): logprob for i, logprob in t.top} for t in tokens],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
        }

    def entry(self, token: int, logprob: Optional[float]) -> Fields:
        text = self.token_text(token)
        is_text = "\ufffd" not in text  # otherwise a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_text else None}

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


def choice(index: int, content: Fields, logprobs: Optional[Fields] = None, finish: Optional[str] = None) -> Fields:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def usage_of(generation: Generation) -> Fields:
    prompt, new = generation.n_prompt, generation.n_new
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def openai_response(generation: Generation, chat: bool) -> Response:
    format = ResponseFormat(chat, generation)
    if generation.stream:
        return GenerationStream(generation, server_sent_events(generation, format), "text/event-stream")
    answers = await collect(generation)
    # in a thread: the log-probabilities of a long answer take a while
    return await asyncio.to_thread(lambda: JSONResponse(format.complete(answers, usage_of(generation))))


async def litgpt_response(generation: Generation, stream: bool) -> Response:
    if stream or generation.stream:
        return GenerationStream(generation, json_lines(generation), "application/x-ndjson")
    answers = await collect(generation)
    outputs = ["".join(delta.text for delta in deltas) for deltas in answers]
    reasons = [deltas[-1].finish if deltas else None for deltas in answers]
    fields: Fields = {"output": outputs[0] if generation.n == 1 else outputs}
    if "length" in reasons:  # LitGPT's response does not have it
        fields["finish_reason"] = reasons[0] if generation.n == 1 else reasons
    return JSONResponse(fields)


class GenerationStream(StreamingResponse):
    """A response in parts. However it ends, the generation ends with it."""

    def __init__(self, generation: Generation, parts: AsyncIterator[str], media_type: str) -> None:
        super().__init__(parts, media_type=media_type, headers=STREAM_HEADERS)
        self.generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.cancel()


async def collect(generation: Generation) -> list[list[Delta]]:
    answers: list[list[Delta]] = [[] for _ in generation.sequences]
    async for delta in generation.deltas():
        answers[delta.index].append(delta)
    return answers


async def server_sent_events(generation: Generation, format: ResponseFormat) -> AsyncIterator[str]:
    include_usage = generation.include_usage
    more: Fields = {"usage": None} if include_usage else {}
    try:
        for chunk in format.first_chunks(len(generation.sequences)):
            yield sse({**chunk, **more})
        async for delta in generation.deltas():
            for chunk in format.chunks(delta):
                yield sse({**chunk, **more})
        if include_usage:
            yield sse(format.chunk(usage=usage_of(generation)))
    except Failure as e:
        yield sse(e.body)
    yield "data: [DONE]\n\n"


def sse(fields: Fields) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def json_lines(generation: Generation) -> AsyncIterator[str]:
    """LitGPT's stream: a line of JSON for each part of the answer, and one that says if a limit ended it."""
    try:
        async for delta in generation.deltas():
            truncated = {"finish_reason": "length"} if delta.finish == "length" else {}
            if delta.text or truncated:
                yield json.dumps({"output": delta.text, **truncated}) + "\n"
    except Failure as e:
        yield json.dumps(e.body) + "\n"
