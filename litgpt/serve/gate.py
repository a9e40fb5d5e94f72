"""What every request passes before a route sees it: the key, the limits, and the log."""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Optional

from starlette.responses import JSONResponse

from litgpt.serve.failure import Failure
from litgpt.serve.metrics import Metrics

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
BODY_SECONDS = 30.0  # in which a body must have come
log = logging.getLogger("litgpt.serve")


class Gate:
    """ASGI middleware. Neither bodies nor queries are logged.

    Args:
        app: What lies behind it.
        metrics: Counts requests by path and status.
        known: The paths that are counted by their own name.
        open_paths: Those that need no key.
        api_key: What `Authorization: Bearer` has to hold; None for nothing.
        local_only: Whether the Host header has to be this machine's: a page of another site, whose name was made to
            point here, has its own name there.
        max_body: Bytes of a body.
        most: So many requests with a body may be under way at once.

    Attributes:
        active: Requests with a body that are under way.
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
        most: int,
    ) -> None:
        self.app, self.metrics, self.known, self.open_paths = app, metrics, known, open_paths
        self.key = api_key.encode() if api_key is not None else None
        self.local_only, self.max_body, self.most = local_only, max_body, most
        self.active, self.stopping = 0, False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no websockets
        began, status = time.perf_counter(), 500

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        with_body = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        self.active += with_body
        try:
            self.check(scope, with_body)
            if with_body:
                receive = replay(await self.read(scope, receive), receive)
            await self.app(scope, receive, noting)
        except Failure as e:
            await JSONResponse(e.body, e.status, e.headers)(scope, receive, noting)
        finally:
            self.active -= with_body
            path = scope["path"] if scope["path"] in self.known else "other"
            self.metrics.requests[path, status] += 1
            log.info("%s %s %d %.3fs", scope["method"], path, status, time.perf_counter() - began)

    def check(self, scope: MutableMapping[str, Any], with_body: bool) -> None:
        """Raise `Failure` for whom or what may not pass."""
        headers = dict(scope["headers"])
        if self.local_only and not is_local(headers.get(b"host", b"").decode("latin-1")):
            raise Failure(403, "This server answers to its own address only. Set an API key to let others in.")
        if self.key is not None and scope["path"] not in self.open_paths:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not (hmac.compare_digest(given.strip(), self.key) and kind.lower() == b"bearer"):
                raise Failure(401, "The API key is wrong or missing; it belongs into the header Authorization: Bearer.")
        if with_body and self.stopping:
            raise Failure(503, "The server is about to stop.")
        if with_body and self.active > self.most:
            raise Failure(429, f"Too many requests at once (at most {self.most}). Try again soon.")

    async def read(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """The body. One that is too large is read to its end, and forgotten, so that the client hears the answer.

        Raises:
            Failure: it is too large, or does not come.
        """
        parts, size, more = list[bytes](), 0, True
        end = time.monotonic() + BODY_SECONDS
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0, end - time.monotonic()))
            except asyncio.TimeoutError:
                if size > self.max_body:
                    break
                raise Failure(408, f"The body did not come within {BODY_SECONDS:g} seconds.") from None
            if message["type"] == "http.disconnect":
                raise Failure(400, "The client went away.")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self.max_body:
                parts.clear()
        if size > self.max_body:
            raise Failure(413, f"The body has more than {self.max_body} bytes (--max_body).")
        return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out a body that was read, and then goes on with the real one."""
    waiting = [body]

    async def again() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


def is_local(host: str) -> bool:
    """Whether a Host header is an address or `localhost`, and no other name."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() in ("localhost", ""):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
