"""What every request passes before a route sees it: the key, the limits, and the log."""

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, Optional
from urllib.parse import unquote

from starlette.responses import JSONResponse

from litgpt.serve.failure import Failure
from litgpt.serve.hosts import is_local, is_own
from litgpt.serve.lanes import SMALL
from litgpt.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
BODY_SECONDS = 30.0  # in which a body must have come
GONE = 499  # the status that is noted where the client went away before the answer
ABSOLUTE = re.compile(rb"https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
log = logging.getLogger("litgpt.serve")


class Gone(Exception):
    """The client went away."""


class RequestGuard:
    """ASGI middleware. Neither bodies nor queries are logged.

    Args:
        app: What lies behind it. It is cancelled when the client of a request with a body goes away.
        metrics: Counts requests by path and status.
        known: The paths that are counted by their own name.
        open_paths: Those that need no key.
        api_key: What `Authorization: Bearer` has to hold; None for nothing.
        local_only: Whether the Host header has to be this machine's: a page of another site, whose name was made to
            point here, has its own name there. So has the Origin header, where there is one.
        max_body: Bytes of a body.
        max_bodies: Bytes of all large bodies together.
        most: So many requests with a body may be under way at once.

    Attributes:
        active: Requests with a body that are under way; one whose body is still to come does not count.
        held: Bytes of all bodies.
        stopping: New ones are turned away.
    """

    def __init__(
        self,
        app: Any,
        metrics: Metrics,
        known: Collection[str],
        open_paths: Collection[str],
        api_key: Optional[str],
        local_only: bool,
        max_body: int,
        max_bodies: int,
        most: int,
    ) -> None:
        self.app, self.metrics, self.known, self.open_paths = app, metrics, known, open_paths
        self.key = api_key.encode() if api_key is not None else None
        self.local_only, self.max_body, self.max_bodies, self.most = local_only, max_body, max_bodies, most
        self.active, self.held, self.stopping = 0, 0, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no websockets
        began, status, whole = time.perf_counter(), GONE, False
        hosts = of_target(scope) + [v.decode("latin-1") for k, v in scope["headers"] if k == b"host"]
        headers = dict(scope["headers"])

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            elif not message.get("more_body", False):
                whole = True
            await send(message)

        body = Body(self, receive) if scope["method"] not in ("GET", "HEAD", "OPTIONS") else None
        try:
            self.check(scope["path"], headers, [v for k, v in scope["headers"] if k == b"origin"], hosts)
            if body is None:
                await self.app(scope, receive, noting)
            else:
                self.admit()
                await body.read(int(headers.get(b"content-length", b"0")))
                self.admit()
                self.active += 1
                try:
                    await self.answer(scope, body, noting, lambda: whole)
                finally:
                    self.active -= 1
        except Gone:
            pass
        except Failure as e:
            if body is not None and b"expect" not in headers:
                await body.pass_over()
            await JSONResponse(e.body, e.status, e.headers)(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            if body is not None:
                body.free()
            path = scope["path"] if scope["path"] in self.known else "other"
            self.metrics.requests[path, status] += 1
            log.info("%s %s %d %.3fs", scope["method"][:16], path, status, time.perf_counter() - began)

    def check(self, path: str, headers: dict[bytes, bytes], origins: Sequence[bytes], hosts: Sequence[str]) -> None:
        """Raise `Failure` for whom may not pass."""
        if self.local_only and not (
            all(map(is_local, hosts)) and all(is_own(o.decode("latin-1"), hosts) for o in origins)
        ):
            raise Failure(403, "This server answers to its own address only. Set an API key to let others in.")
        if self.key is not None and path not in self.open_paths:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not (hmac.compare_digest(given.strip(), self.key) and kind.lower() == b"bearer"):
                raise Failure(401, "The API key is wrong or missing; it belongs into the header Authorization: Bearer.")

    def admit(self) -> None:
        """Raise `Failure` where one more request is too many."""
        if self.stopping:
            raise Failure(503, "The server is about to stop.")
        if self.active >= self.most:
            raise Failure(429, f"Too many requests at once (at most {self.most}). Try again soon.")

    async def answer(self, scope: Scope, body: "Body", send: Send, whole: Callable[[], bool]) -> None:
        """Let the application answer, as long as the client is there.

        Args:
            whole: Whether all of the answer was sent.
        """
        gone = asyncio.ensure_future(body.gone())
        answering = asyncio.ensure_future(self.app(scope, body.replay(gone), send))
        try:
            await asyncio.wait((gone, answering), return_when=asyncio.FIRST_COMPLETED)
            if whole():
                await asyncio.wait((answering,))
        finally:
            gone.cancel()
            while not answering.done():  # `wait_for` of older Pythons may lose what cancels it
                answering.cancel()
                await asyncio.wait((answering,), timeout=0.1)
        with suppress(asyncio.CancelledError):
            answering.result()


class Body:
    """The body of a request while it comes.

    Args:
        gate: Counts the bytes.
    """

    def __init__(self, gate: RequestGuard, receive: Receive) -> None:
        self.gate, self.receive = gate, receive
        self.parts, self.size, self.more = list[bytes](), 0, True
        self.end = time.monotonic() + BODY_SECONDS

    async def read(self, announced: int) -> None:
        """Raises:
        Failure: it is too large, or does not come, or all bodies together are too large.
        Gone: the client went away.
        """
        if announced > self.gate.max_body:
            raise self.too_large()
        while self.more:
            part = await self.next()
            self.parts.append(part)
            self.size += len(part)
            self.gate.held += len(part)
            if self.size > self.gate.max_body:
                raise self.too_large()
            if self.size > SMALL and self.gate.held > self.gate.max_bodies:
                raise Failure(429, "Too many large requests at once. Try again soon.")

    async def next(self) -> bytes:
        try:
            message = await asyncio.wait_for(self.receive(), max(0, self.end - time.monotonic()))
        except asyncio.TimeoutError:
            raise Failure(408, f"The body did not come within {BODY_SECONDS:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise Gone
        self.more = message.get("more_body", False)
        return message.get("body", b"")

    def too_large(self) -> Failure:
        return Failure(413, f"The body has more than {self.gate.max_body} bytes (--max_body).")

    def free(self) -> None:
        self.gate.held -= self.size
        self.parts, self.size = [], 0

    async def pass_over(self) -> None:
        """Read the rest, and forget it: a client that is still sending hears no answer."""
        self.free()
        with suppress(Failure, Gone):
            while self.more:
                await self.next()

    async def gone(self) -> None:
        """Wait for the client to go away."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def replay(self, gone: asyncio.Future) -> Receive:
        """A `receive` that hands the body out once, and keeps nothing of it."""

        async def again() -> MutableMapping[str, Any]:
            if self.parts:
                whole, self.parts = b"".join(self.parts), []
                return {"type": "http.request", "body": whole, "more_body": False}
            await asyncio.wait((gone,))
            return {"type": "http.disconnect"}

        return again


def of_target(scope: Scope) -> list[str]:
    """The host in a request target that is a whole URL; usually there is none. The path is that of the target, without
    a slash at its end."""
    found = ABSOLUTE.fullmatch(scope.get("raw_path") or b"")
    path = unquote(found[2].decode("latin-1")) if found else scope["path"]
    scope["path"] = path.rstrip("/") or "/"
    return [found[1].decode("latin-1")] if found else []
