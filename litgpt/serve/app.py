"""The routes: what a request asks for, to texts for the engine, to an answer."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from litgpt.errors import UserError, nearest
from litgpt.generate.engine import Engine, Text
from litgpt.generate.loaded import Loaded
from litgpt.generate.sampling import Sampling
from litgpt.generate.text import TextStream
from litgpt.serve.failure import Failure
from litgpt.serve.gate import Gate
from litgpt.serve.metrics import Metrics
from litgpt.serve.models import Offer
from litgpt.serve.schema import Chat, Completion, Drawing, Message, Predict
from litgpt.serve.shapes import Shape, usage
from litgpt.serve.worker import Job, News, Piece, Worker

PAGE = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css")}
PAGE["/script.js"] = ("script.js", "text/javascript")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
OF_API = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
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

    def __init__(self, offer: Offer, settings: Settings) -> None:
        self.offer, self.settings = offer, settings
        self.metrics = Metrics()
        self.most = settings.max_batch + settings.max_queue
        model = offer.models[offer.default].model
        self.worker = Worker(Engine(model, settings.max_batch, adapters=offer.adapters), self.most)
        self.watching: set[asyncio.Task] = set()
        self.gate: Optional[Gate] = None  # made with the application, before its first request

    def find(self, name: Optional[str]) -> tuple[str, Loaded]:
        """The model that a request names. Raises `Failure` where there is none."""
        found = self.offer.default if name is None else self.offer.find(name)
        if found is None:
            known = ", ".join(self.offer.models)
            hint = nearest(str(name), self.offer.models)
            raise Failure(
                404, f"There is no model {str(name)[:80]!r}.{hint} There are: {known}.", "model", "model_not_found"
            )
        return found, self.offer.models[found]

    def sampling(self, body: Drawing) -> Sampling:
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
        body: Drawing,
        name: str,
        prompts: Callable[[], list[list[int]]],
        most: Optional[int],
        request: Request,
    ) -> Job:
        """Submit `n` answers to each prompt.

        Args:
            prompts: Makes the ids; runs in another thread, since long prompts take a while.
            most: The length of an answer; None for all that the context leaves.

        Raises:
            Failure: a prompt cannot be read, or too many wait.
        """
        loaded, began = self.offer.models[name], asyncio.get_running_loop().time()
        param = "messages" if isinstance(body, Chat) else "prompt"
        try:
            ids = await asyncio.to_thread(prompts)
        except UserError as e:
            raise Failure(400, str(e), param) from e
        except (UnicodeError, RecursionError) as e:
            raise Failure(400, "A text is no Unicode text, or is nested too deeply.") from e
        if len(ids) * body.n > self.most:
            raise Failure(400, f"{len(ids) * body.n} answers at once; this server takes at most {self.most}.", "n")
        sampling, seed = self.sampling(body), body.seed
        seed = random.getrandbits(48) if seed is None else seed
        top = body.top if body.top is None else min(body.top, loaded.model.config.padded_vocab_size)
        texts = [
            Text(
                prompt,
                most or loaded.model.config.block_size,
                sampling,
                loaded.stop_ids,
                seed + i,
                top,
                self.offer.adapter(name),
            )
            for prompt in ids
            for i in range(body.n)
        ]
        for text in texts:
            try:
                text.check(loaded.model)
            except UserError as e:
                code = "context_length_exceeded" if len(text.prompt) > 1 else None
                raise Failure(400, str(e), param, code) from e
        streams = [TextStream(loaded.tokenizer, text.prompt, body.stop) for text in texts]
        job = Job(texts, streams, name, sum(map(len, ids)), began, self.settings.timeout)
        self.worker.submit(job)
        watching = asyncio.create_task(watch(job, request))
        self.watching.add(watching)  # the loop itself holds tasks weakly
        watching.add_done_callback(self.watching.discard)
        job.over = watching.cancel
        return job

    def note(self, news: Sequence[News]) -> None:
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


async def watch(job: Job, request: Request) -> None:
    """Give up a job whose client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()
    job.news.put_nowait(None)


async def collect(job: Job) -> list[list[Piece]]:
    answers: list[list[Piece]] = [[] for _ in job.texts]
    async for piece in job.pieces():
        answers[piece.index].append(piece)
    return answers


async def events(job: Job, shape: Shape, include_usage: bool) -> AsyncIterator[str]:
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


async def respond(job: Job, shape: Shape, body: Drawing) -> Response:
    if body.stream:
        made = events(job, shape, body.stream_options.include_usage)
        return StreamingResponse(made, media_type="text/event-stream", headers=STREAM)
    return JSONResponse(shape.whole(await collect(job), job.n_prompt, job.n_new))


def as_dict(message: Message) -> dict[str, Any]:
    """A message for the chat template: the text of all parts, and its other fields unchanged, without those that hold
    nothing and those that only rows of training have."""
    dumped = message.model_dump(exclude_none=True, exclude={"input", "train"})
    fields = {name: value for name, value in dumped.items() if value != []}
    fields["role"] = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, str):
        fields["content"] = "".join(part.text for part in message.content or ())
    return fields


def make_app(offer: Offer, settings: Settings) -> FastAPI:
    """The application; its `state.service` has all that it owns."""
    service = Service(offer, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.on_news = service.note
        service.worker.start()
        yield
        service.worker.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, title="litgpt serve")
    app.state.service = service
    add_answers(app, service)
    add_views(app, service)
    app.add_exception_handler(Failure, on_failure)
    app.add_exception_handler(RequestValidationError, on_invalid)
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
        "most": service.most,
    }
    app.add_middleware(make_gate(service), **gate)
    return app


def make_gate(service: Service) -> Any:
    def make(app: Any, **options: Any) -> Gate:
        service.gate = Gate(app, **options)
        return service.gate

    return make


def add_answers(app: FastAPI, service: Service) -> None:
    """The routes that the engine answers."""
    settings = service.settings

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        name, loaded = service.find(body.model)
        messages = [as_dict(m) for m in body.messages]
        most = body.max_completion_tokens or body.max_tokens or settings.max_new_tokens
        job = await service.start(body, name, lambda: [loaded.render(messages, body.tools or None)[1]], most, request)
        return await respond(job, Shape("chat/completions", name, loaded.tokenizer, body.top is not None), body)

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        name, loaded = service.find(body.model)

        def prompts() -> list[list[int]]:
            known = loaded.tokenizer.vocab_size
            if wrong := [i for p in body.prompts if not isinstance(p, str) for i in p if i >= known]:
                raise UserError(f"The prompt has the token {wrong[0]}; the tokenizer knows those below {known}.")
            found = [loaded.tokenizer.encode(p) if isinstance(p, str) else p for p in body.prompts]
            for ids in found:
                loaded.tokenizer.check(ids)
            return found

        job = await service.start(body, name, prompts, body.max_tokens or settings.max_new_tokens, request)
        return await respond(job, Shape("completions", name, loaded.tokenizer, body.top is not None), body)

    async def predict(body: Predict, request: Request) -> Response:
        name, loaded = service.find(body.model)
        most = body.max_new_tokens or body.max_tokens or settings.max_new_tokens or 50
        messages = [{"role": "user", "content": body.prompt}]
        job = await service.start(body, name, lambda: [loaded.render(messages)[1]], most, request)
        if settings.stream or body.stream:
            return StreamingResponse(lines(job), media_type="application/x-ndjson", headers=STREAM)
        outputs = ["".join(piece.text for piece in pieces) for pieces in await collect(job)]
        return JSONResponse({"output": outputs[0] if body.n == 1 else outputs})

    if settings.api_path:
        app.post(settings.api_path)(predict)


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
    @app.get("/v1/models/")
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


async def on_invalid(request: Request, e: Any) -> Response:
    """All that is wrong with a body, in one line."""
    said, param = [], None
    for error in e.errors()[:8]:
        if error["type"] == "json_invalid":
            return JSONResponse(Failure(400, "The body is no JSON.", None, "invalid_body").body, 400)
        message = str(error["msg"]).removeprefix("Value error, ")
        place = [str(part) for part in error["loc"] if part != "body"]
        param = param or (".".join(place) or None)
        said.append(f"{'.'.join(place)[:80]}: {message}" if place else message)
    return JSONResponse(Failure(400, "; ".join(said)[:1000] + ".", param and param[:80], "invalid_body").body, 400)


async def on_http(request: Request, e: Any) -> Response:
    words = {404: "There is nothing at this path.", 405: "This path takes another method."}
    failure = Failure(e.status_code, words.get(e.status_code, str(e.detail)))
    return JSONResponse(failure.body, e.status_code, e.headers)


async def on_bug(request: Request, e: Union[Exception, Any]) -> Response:
    return JSONResponse(Failure(500, "The server failed; its log says why.").body, 500)
