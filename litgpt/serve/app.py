"""The routes: what a request asks for, to texts for the engine, to an answer."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from litgpt.errors import UserError, nearest
from litgpt.generate.engine import Engine
from litgpt.generate.engine import Request as DecodeRequest
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.generate.text import TextStream
from litgpt.serve.failure import Failure
from litgpt.serve.guard import RequestGuard
from litgpt.serve.lanes import Lanes
from litgpt.serve.metrics import Metrics
from litgpt.serve.models import ModelRegistry
from litgpt.serve.responses import ResponseFormat, usage
from litgpt.serve.schema import Chat, Completion, Message, Passed, Predict, SamplingParams, parse
from litgpt.serve.worker import Job, Piece, TokenEvent, Worker, too_slow
from litgpt.text.tokenizer import Tokenizer, TooLong

PAGE = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css")}
PAGE["/script.js"] = ("script.js", "text/javascript")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
OF_API = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
N_BODIES = 16  # of the largest size, which are kept at once
ROWS_ONLY = ("input", "train")  # fields of messages that a template would show, and no client means
REF = "#/components/schemas/{model}"
D = TypeVar("D", bound=SamplingParams)
STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class Settings:
    """What the command line says; see `litgpt serve -h`."""

    temperature: float = 0.8
    top_k: Optional[int] = 50
    top_p: float = 1.0
    max_new_tokens: Optional[int] = None
    api_path: Optional[str] = "/predict"
    stream: bool = False
    timeout: float = 600.0
    max_batch: int = 16
    max_queue: int = 64
    max_body: int = 4_194_304
    api_key: Optional[str] = None
    local_only: bool = True


class Service:
    """What the routes share."""

    def __init__(self, offer: ModelRegistry, settings: Settings) -> None:
        self.offer, self.settings = offer, settings
        self.metrics = Metrics()
        self.most = settings.max_batch + settings.max_queue
        model = offer.models[offer.default].model
        self.worker = Worker(Engine(model, settings.max_batch, adapters=offer.adapters), self.most)
        self.lanes = Lanes()
        self.gate: Optional[RequestGuard] = None  # made with the application, before its first request

    def find(self, name: Optional[str]) -> tuple[str, InferenceModel]:
        """The model that a request names. Raises `Failure` where there is none."""
        found = self.offer.default if name is None else self.offer.find(name)
        if found is None:
            known = ", ".join(self.offer.models)
            hint = nearest(str(name), self.offer.models)
            raise Failure(
                404, f"There is no model {str(name)[:80]!r}.{hint} There are: {known}.", "model", "model_not_found"
            )
        return found, self.offer.models[found]

    def sampling(self, body: SamplingParams) -> Sampling:
        own, given = self.settings, body.model_fields_set
        return Sampling(
            own.temperature if body.temperature is None else body.temperature,
            body.top_k if "top_k" in given else own.top_k,
            own.top_p if body.top_p is None else body.top_p,
            body.min_p,
            body.repetition_penalty,
        )

    async def start(
        self,
        schema: type[D],
        request: Request,
        prompts: Callable[[D, InferenceModel], list[list[int]]],
        otherwise: Optional[int],
    ) -> tuple[Job, "Asked"]:
        """Read a request, and submit `n` answers to each prompt.

        Args:
            schema: What the body may hold.
            prompts: Makes the ids of the prompts.
            otherwise: The length of an answer where the request does not say; None for all that the context leaves.

        Raises:
            Failure: the request cannot be read or takes too long, or too many wait.
        """
        began, body = asyncio.get_running_loop().time(), (await request.receive())["body"]
        read = partial(self.read, schema, body, request.headers.get("content-type", ""), prompts, otherwise)
        reading = self.lanes.run(len(body), read)
        del body, read  # else they would be kept while others are read
        try:
            asked = await asyncio.wait_for(reading, self.settings.timeout)
        except asyncio.TimeoutError:
            raise too_slow(self.settings.timeout) from None
        job = Job(asked.texts, asked.streams, asked.model, asked.n_prompt, began, self.settings.timeout)
        self.worker.submit(job)
        return job, asked

    def read(
        self,
        schema: type[D],
        content: bytes,
        content_type: str,
        prompts: Callable[[D, InferenceModel], list[list[int]]],
        otherwise: Optional[int],
    ) -> "Asked":
        """What a body asks for; runs in a thread of its own. Raises `Failure` where it cannot be answered."""
        body = parse(schema, content, content_type)
        name, loaded = self.find(body.model)
        config, n = loaded.model.config, body.n_prompts * body.n
        if n > self.most:
            raise Failure(400, f"{n} answers at once; this server takes at most {self.most}.", "n")
        seed = random.getrandbits(48) if body.seed is None else body.seed
        top = body.top if body.top is None else min(body.top, config.padded_vocab_size)
        settings = body.length or otherwise or config.block_size, self.sampling(body), loaded.stop_ids
        try:
            texts = [
                DecodeRequest(prompt, *settings, seed + i, top, self.offer.adapter(name))
                for prompt in prompts(body, loaded)
                for i in range(body.n)
            ]
            for text in texts:
                text.check(loaded.model)
        except UserError as e:
            code = "context_length_exceeded" if isinstance(e, TooLong) else None
            raise Failure(400, str(e), "messages" if isinstance(body, Chat) else "prompt", code) from e
        except RecursionError as e:
            raise Failure(400, "The body is nested too deeply.") from e
        streams = [TextStream(loaded.tokenizer, text.prompt, body.stop) for text in texts]
        n_prompt = sum(len(text.prompt) for text in texts[:: body.n])
        include_usage = body.stream_options.include_usage
        return Asked(
            name, loaded.tokenizer, texts, streams, n_prompt, body.n, body.stream, include_usage, top is not None
        )

    def note(self, news: Sequence[TokenEvent]) -> None:
        """Count what a step of the engine made."""
        for n in news:
            job = n.job
            self.metrics.tokens[job.model, "answer"] += len(n.tokens)
            if n.tokens and not job.noted:
                job.noted = True
                self.metrics.tokens[job.model, "prompt"] += job.n_prompt
                self.metrics.first.add(job.loop.time() - job.began)
            if n.finish and all(job.closed) and not job.timed:
                job.timed = True
                self.metrics.whole.add(job.loop.time() - job.began)


@dataclass
class Asked:
    """What is left of a request once it was read: little, however large its body was."""

    model: str
    tokenizer: Tokenizer
    texts: list[DecodeRequest]
    streams: list[TextStream]
    n_prompt: int
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool


async def collect(job: Job) -> list[list[Piece]]:
    answers: list[list[Piece]] = [[] for _ in job.texts]
    async for piece in job.pieces():
        answers[piece.index].append(piece)
    return answers


async def events(job: Job, shape: ResponseFormat, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events."""
    more: dict[str, Any] = {"usage": None} if include_usage else {}
    try:
        for part in shape.opening(len(job.texts)):
            yield event({**part, **more})
        async for piece in job.pieces():
            for part in shape.parts(piece):
                yield event({**part, **more})
        if include_usage:
            yield event(shape.frame([], part=True, usage=usage(job.n_prompt, job.n_new)))
    except Failure as e:
        yield event(e.body)
    finally:
        job.cancel()
    yield "data: [DONE]\n\n"


def event(fields: Any) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def respond(job: Job, asked: Asked, kind: str) -> Response:
    shape = ResponseFormat(kind, asked.model, asked.tokenizer, asked.logprobs)
    if asked.stream:
        return JobStream(job, events(job, shape, asked.include_usage), "text/event-stream")
    answers = await collect(job)
    return await asyncio.to_thread(lambda: JSONResponse(shape.whole(answers, job.n_prompt, job.n_new)))


class JobStream(StreamingResponse):
    """An answer in parts, which ends its job however it ends."""

    def __init__(self, job: Job, parts: AsyncIterator[str], media_type: str) -> None:
        super().__init__(parts, media_type=media_type, headers=STREAM)
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


def as_dict(message: Message) -> dict[str, Any]:
    """A message for the chat template: the text of all parts, and its other fields unchanged, without those that hold
    nothing and those that only rows of training have."""
    fields = {name: value for name, value in fields_of(message).items() if value != [] and name not in ROWS_ONLY}
    if message.tool_calls:
        fields["tool_calls"] = [{**fields_of(c), "function": fields_of(c.function)} for c in message.tool_calls]
    fields["role"] = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, str):
        fields["content"] = "".join(part.text for part in message.content or ())
    return fields


def fields_of(part: Passed) -> dict[str, Any]:
    """All fields that are not null, those that are passed on included."""
    named = {name: getattr(part, name) for name in type(part).model_fields}
    return {name: value for name, value in {**named, **(part.model_extra or {})}.items() if value is not None}


def chat_prompts(body: Chat, loaded: InferenceModel) -> list[list[int]]:
    messages = [as_dict(m) for m in body.messages]
    return [loaded.render(messages, body.tools or None, loaded.model.config.block_size)[1]]


def completion_prompts(body: Completion, loaded: InferenceModel) -> list[list[int]]:
    known, limit = loaded.tokenizer.vocab_size, loaded.model.config.block_size
    for prompt in body.prompts:
        if not isinstance(prompt, str) and prompt and (largest := max(prompt)) >= known:
            raise UserError(f"The prompt has the token {largest}; the tokenizer knows those below {known}.")
    found = [loaded.tokenizer.encode(p, limit=limit) if isinstance(p, str) else p for p in body.prompts]
    for ids in found:
        loaded.tokenizer.check(ids)
    return found


def predict_prompts(body: Predict, loaded: InferenceModel) -> list[list[int]]:
    return [loaded.render([{"role": "user", "content": body.prompt}], None, loaded.model.config.block_size)[1]]


def make_app(offer: ModelRegistry, settings: Settings) -> FastAPI:
    """The application; its `state.service` has all that it owns."""
    service = Service(offer, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.on_news = service.note
        service.worker.start()
        yield
        service.worker.stop()
        service.lanes.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, title="litgpt serve", redirect_slashes=False)
    app.state.service = service
    add_answers(app, service)
    add_views(app, service)
    add_schemas(app)
    app.add_exception_handler(Failure, on_failure)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)
    predict = [settings.api_path] if settings.api_path else []
    gate: dict[str, Any] = {
        "metrics": service.metrics,
        "known": {*OF_API, *PAGE, *predict},
        "open_paths": {*PAGE, "/health"},
        "api_key": settings.api_key,
        "local_only": settings.local_only and settings.api_key is None,
        "max_body": settings.max_body,
        "max_bodies": N_BODIES * settings.max_body,
        "most": service.most,
    }
    app.add_middleware(make_gate(service), **gate)
    return app


def make_gate(service: Service) -> Any:
    def make(app: Any, **options: Any) -> RequestGuard:
        service.gate = RequestGuard(app, **options)
        return service.gate

    return make


def add_answers(app: FastAPI, service: Service) -> None:
    """The routes that the engine answers."""
    settings = service.settings

    @app.post("/v1/chat/completions", openapi_extra=schema_of(Chat))
    async def chat(request: Request) -> Response:
        started = await service.start(Chat, request, chat_prompts, settings.max_new_tokens)
        return await respond(*started, "chat/completions")

    @app.post("/v1/completions", openapi_extra=schema_of(Completion))
    async def completions(request: Request) -> Response:
        started = await service.start(Completion, request, completion_prompts, settings.max_new_tokens)
        return await respond(*started, "completions")

    async def predict(request: Request) -> Response:
        job, asked = await service.start(Predict, request, predict_prompts, settings.max_new_tokens or 50)
        if settings.stream or asked.stream:
            return JobStream(job, lines(job), "application/x-ndjson")
        outputs = ["".join(piece.text for piece in pieces) for pieces in await collect(job)]
        return JSONResponse({"output": outputs[0] if asked.n == 1 else outputs})

    if settings.api_path:
        app.post(settings.api_path, openapi_extra=schema_of(Predict))(predict)


def schema_of(schema: type[SamplingParams]) -> dict[str, Any]:
    """What /openapi.json says of a body, which `Service.read` reads."""
    found = {"schema": {"$ref": REF.format(model=schema.__name__)}}
    return {"requestBody": {"required": True, "content": {"application/json": found}}}


def add_schemas(app: FastAPI) -> None:
    """Let /openapi.json have what bodies may hold."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        _, found = models_json_schema([(s, "validation") for s in (Chat, Completion, Predict)], ref_template=REF)
        described = made()
        return {**described, "components": {"schemas": described["components"]["schemas"] | found["$defs"]}}

    app.openapi = openapi  # type: ignore[method-assign]


async def lines(job: Job) -> AsyncIterator[str]:
    """LitGPT's stream: a line of JSON for each piece."""
    try:
        async for piece in job.pieces():
            if piece.text:
                yield json.dumps({"output": piece.text}) + "\n"
    except Failure as e:
        yield json.dumps(e.body) + "\n"
    finally:
        job.cancel()


def add_views(app: FastAPI, service: Service) -> None:
    """The routes that are answered at once."""
    created = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [
            {"id": name, "object": "model", "created": created, "owned_by": "litgpt"} for name in service.offer.models
        ]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")  # names of the hub have a slash
    async def model(name: str) -> dict[str, Any]:
        return {"id": service.find(name)[0], "object": "model", "created": created, "owned_by": "litgpt"}

    @app.get("/health")
    async def health() -> Response:
        if (trouble := service.worker.trouble) is not None:
            return JSONResponse({"status": "failed", "reason": trouble}, 503)
        stopping = service.gate is not None and service.gate.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        worker, load = service.worker, service.worker.load
        text = service.metrics.text(load.running, load.waiting, worker.failures, worker.trouble is None)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    for path, (file, kind) in PAGE.items():
        content = (Path(__file__).parent / "page" / file).read_bytes()
        app.get(path)(page(content, kind))


def page(content: bytes, kind: str) -> Callable[[], Any]:
    async def view() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)

    return view


async def on_failure(request: Request, e: Any) -> Response:
    return JSONResponse(e.body, e.status, e.headers)


async def on_http(request: Request, e: Any) -> Response:
    words = {404: "There is nothing at this path.", 405: "This path takes another method."}
    failure = Failure(e.status_code, words.get(e.status_code, str(e.detail)))
    return JSONResponse(failure.body, e.status_code, e.headers)


async def on_bug(request: Request, e: Union[Exception, Any]) -> Response:
    return JSONResponse(Failure(500, "The server failed; its log says why.").body, 500)
