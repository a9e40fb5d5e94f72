"""The application: its routes, and the guard around it."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from litgpt.serve.about import about_models
from litgpt.serve.failure import Failure
from litgpt.serve.guard import RequestGuard
from litgpt.serve.models import ModelRegistry
from litgpt.serve.responses import litgpt_response, openai_response
from litgpt.serve.schema import Chat, Completion, Predict, SamplingParams
from litgpt.serve.service import Service
from litgpt.serve.settings import Settings
from litgpt.serve.worker import Generation

PAGE_FILES = Path(__file__).parent / "page"
PAGE = {
    "/": "page.html",
    **{
        f"/page/{name}": name
        for name in (
            "page.css",
            "main.js",
            "api.js",
            "conversation.js",
            "markdown.js",
            "settings.js",
            "view.js",
            "vendor/marked.esm.js",
            "vendor/purify.min.js",
        )
    },
}
ABOUT = "/page/about.json"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
API_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", ABOUT)
SCHEMA_REF = "#/components/schemas/{model}"
Respond = Callable[[Generation], Awaitable[Response]]


class App:
    """A FastAPI application behind a `RequestGuard`, which is what a server runs."""

    def __init__(self, registry: ModelRegistry, settings: Settings) -> None:
        self.service = Service(registry, settings)
        api_paths = [*API_PATHS, *([settings.api_path] if settings.api_path else [])]
        self.guard = RequestGuard(
            self.make_fastapi(),
            settings=settings,
            metrics=self.service.metrics,
            known_paths={*api_paths, *PAGE},
            open_paths={*PAGE, "/health"},
        )

    def make_fastapi(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            self.service.worker.start()
            yield
            self.service.worker.stop()
            self.service.lanes.close()

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, title="litgpt serve", redirect_slashes=False)
        self.add_generation(app)
        self.add_status(app)
        add_page(app)
        add_schemas(app)
        app.add_exception_handler(Failure, on_failure)
        app.add_exception_handler(HTTPException, on_http_error)
        app.add_exception_handler(Exception, on_bug)
        return app

    def add_generation(self, app: FastAPI) -> None:
        """The routes that generate text."""
        settings = self.service.settings

        def add(path: str, schema: type[SamplingParams], respond: Respond) -> None:
            async def answer(request: Request) -> Response:
                return await respond(await self.service.start(schema, request))

            reference = {"schema": {"$ref": SCHEMA_REF.format(model=schema.__name__)}}
            described = {"requestBody": {"required": True, "content": {"application/json": reference}}}
            app.post(path, openapi_extra=described, name=schema.__name__.lower())(answer)

        add("/v1/chat/completions", Chat, partial(openai_response, chat=True))
        add("/v1/completions", Completion, partial(openai_response, chat=False))
        if settings.api_path:
            add(settings.api_path, Predict, partial(litgpt_response, stream=settings.stream))

    def add_status(self, app: FastAPI) -> None:
        """The routes about the server itself."""
        service, worker = self.service, self.service.worker
        about = about_models(service.registry, service.settings)
        fields = {"object": "model", "created": int(time.time()), "owned_by": "litgpt"}

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": name, **fields} for name in service.registry.models]}

        @app.get("/v1/models/{name:path}")  # names on the hub contain a slash
        async def model(name: str) -> dict[str, Any]:
            return {"id": service.find(name)[0], **fields}

        @app.get(ABOUT)
        async def about_page() -> dict[str, Any]:
            return about

        @app.get("/health")
        async def health() -> Response:
            if (problem := worker.problem) is not None:
                return JSONResponse({"status": "failed", "reason": problem}, 503)
            stopping = self.guard.stopping
            return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

        @app.get("/metrics")
        async def metrics() -> Response:
            text = service.metrics.text(worker.running, worker.waiting, worker.failures, up=worker.problem is None)
            return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def add_page(app: FastAPI) -> None:
    def add(path: str, file: Path) -> None:
        content, media_type = file.read_bytes(), f"{MEDIA_TYPES[file.suffix]}; charset=utf-8"

        async def view() -> Response:
            return Response(content, media_type=media_type, headers=PAGE_HEADERS)

        app.get(path)(view)

    for path, name in PAGE.items():
        add(path, PAGE_FILES / name)


def add_schemas(app: FastAPI) -> None:
    """Add the schemas of the bodies to /openapi.json: FastAPI does not know them, as it does not parse the bodies."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        _, found = models_json_schema([(s, "validation") for s in (Chat, Completion, Predict)], ref_template=SCHEMA_REF)
        described = original()
        return {**described, "components": {"schemas": described["components"]["schemas"] | found["$defs"]}}

    app.openapi = openapi  # type: ignore[method-assign]


async def on_failure(request: Request, e: Any) -> Response:
    return e.response()


async def on_http_error(request: Request, e: Any) -> Response:
    messages = {404: "Unknown path.", 405: "This path requires another method."}
    failure = Failure(e.status_code, messages.get(e.status_code, str(e.detail)))
    return JSONResponse(failure.body, e.status_code, e.headers)


async def on_bug(request: Request, e: Exception) -> Response:
    return Failure(500, "The server failed. See its log.").response()
