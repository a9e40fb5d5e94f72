"""What every request passes before a route handles it: access, the limits of its body, and the log."""

import asyncio
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, Optional, Union
from urllib.parse import unquote

from litgpt.serve.failure import Failure
from litgpt.serve.metrics import Metrics
from litgpt.serve.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
BODY_SECONDS = 30.0  # time limit for a body to arrive
SMALL = 65_536  # the largest small body, in bytes
N_BODIES = 16  # how many bodies of the largest size may be in memory at once
DISCONNECTED = 499  # the status that is counted if the client went away before the response
ABSOLUTE = re.compile(rb"https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s\[\]:@/\\?#%,]+))(?::[0-9]{0,5})?", re.IGNORECASE)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([^/]*)", re.IGNORECASE)
Host = Union[str, ipaddress.IPv4Address, ipaddress.IPv6Address]
log = logging.getLogger("litgpt.serve")


class Disconnected(Exception):
    """The client closed the connection."""


class BodyMemory:
    """The bytes of all bodies that are in memory."""

    def __init__(self, max_body: int) -> None:
        self.max_body, self.max_held, self.held = max_body, N_BODIES * max_body, 0


class Body:
    """The body of one request."""

    def __init__(self, memory: BodyMemory, receive: Receive) -> None:
        self.memory, self.receive = memory, receive
        self.parts, self.size, self.more = list[bytes](), 0, True
        self.deadline = time.monotonic() + BODY_SECONDS

    async def read(self, announced: int) -> None:
        """Read all of it. `announced` is its size in bytes as the client says.

        Raises:
            Failure: It is too large, arrives too slowly, or all bodies together are too large.
            Disconnected: The client went away.
        """
        if announced > self.memory.max_body:
            raise self.too_large()
        while self.more:
            part = await self.receive_part()
            self.parts.append(part)
            self.size += len(part)
            self.memory.held += len(part)
            if self.size > self.memory.max_body:
                raise self.too_large()
            if self.size > SMALL and self.memory.held > self.memory.max_held:
                raise Failure(429, "Too many large requests at once. Try again soon.")

    async def receive_part(self) -> bytes:
        try:
            message = await asyncio.wait_for(self.receive(), max(0, self.deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise Failure(408, f"The body did not arrive within {BODY_SECONDS:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        self.more = message.get("more_body", False)
        return message.get("body", b"")

    def too_large(self) -> Failure:
        return Failure(413, f"The body has more than {self.memory.max_body} bytes (--max_body).")

    def free(self) -> None:
        self.memory.held -= self.size
        self.parts, self.size = [], 0

    async def discard(self) -> None:
        """Read the rest and drop it: a client that is still sending does not read the response."""
        self.free()
        with suppress(Failure, Disconnected):
            while self.more:
                await self.receive_part()

    async def disconnected(self) -> None:
        """Wait for the client to go away."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def replay(self, disconnected: asyncio.Future) -> Receive:
        """A `receive` that returns the complete body once, and keeps nothing of it."""

        async def receive() -> MutableMapping[str, Any]:
            if self.parts:
                content, self.parts = b"".join(self.parts), []
                return {"type": "http.request", "body": content, "more_body": False}
            await asyncio.wait((disconnected,))
            return {"type": "http.disconnect"}

        return receive


class RequestGuard:
    """ASGI middleware. Neither bodies nor queries are logged.

    Args:
        app: The application. A call is cancelled when the client of a request with a body goes away.
        known_paths: The paths that are counted by name.
        open_paths: The paths that need no API key.
    """

    def __init__(
        self, app: Any, settings: Settings, metrics: Metrics, known_paths: Collection[str], open_paths: Collection[str]
    ) -> None:
        self.app, self.metrics, self.known_paths, self.open_paths = app, metrics, known_paths, open_paths
        self.key = settings.api_key.encode() if settings.api_key is not None else None
        self.local_only = settings.local_only
        self.max_active, self.bodies = settings.max_sequences, BodyMemory(settings.max_body)
        self.active = 0  # requests with a complete body that are being answered
        self.stopping = False  # whether new requests are refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # websockets are not supported
        began, status, complete = time.perf_counter(), DISCONNECTED, False
        hosts = normalize_target(scope) + header_values(scope, b"host")
        headers = dict(scope["headers"])

        async def observed_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        body = Body(self.bodies, receive) if scope["method"] not in ("GET", "HEAD", "OPTIONS") else None
        try:
            self.check_host(hosts, header_values(scope, b"origin"))
            self.check_key(scope["path"], headers.get(b"authorization", b""))
            if body is None:
                await self.app(scope, receive, observed_send)
            else:
                self.check_load()
                await body.read(int(headers.get(b"content-length", b"0")))
                self.check_load()
                self.active += 1
                try:
                    await self.run_app(scope, body, observed_send, lambda: complete)
                finally:
                    self.active -= 1
        except Disconnected:
            pass
        except Failure as e:
            if body is not None and b"expect" not in headers:
                await body.discard()
            await e.response()(scope, receive, observed_send)
        except Exception:
            status = 500
            raise
        finally:
            if body is not None:
                body.free()
            path = scope["path"] if scope["path"] in self.known_paths else "other"
            self.metrics.requests[path, status] += 1
            log.info("%s %s %d %.3fs", scope["method"][:16], path, status, time.perf_counter() - began)

    def check_host(self, hosts: list[str], origins: list[str]) -> None:
        """Raise `Failure` for a request that was not meant for this machine, if only local ones are allowed.

        The domain of another site may resolve to this machine (DNS rebinding), but not an address: the Host and Origin
        headers that a browser sends for such a site have the other name.
        """
        if self.local_only and not (all(map(is_local, hosts)) and all(is_own(origin, hosts) for origin in origins)):
            raise Failure(403, "This server answers requests to local addresses only. To allow others, set an API key.")

    def check_key(self, path: str, authorization: bytes) -> None:
        if self.key is None or path in self.open_paths:
            return
        scheme, _, key = authorization.partition(b" ")
        if not (hmac.compare_digest(key.strip(), self.key) and scheme.lower() == b"bearer"):
            raise Failure(401, "The API key is missing or wrong. Send it in the header Authorization: Bearer KEY.")

    def check_load(self) -> None:
        if self.stopping:
            raise Failure(503, "The server is stopping.")
        if self.active >= self.max_active:
            raise Failure(429, f"Too many requests at once (at most {self.max_active}). Try again soon.")

    async def run_app(self, scope: Scope, body: Body, send: Send, is_complete: Callable[[], bool]) -> None:
        """Let the application answer as long as the client is there. `is_complete` says whether all was sent."""
        disconnected = asyncio.ensure_future(body.disconnected())
        answering = asyncio.ensure_future(self.app(scope, body.replay(disconnected), send))
        try:
            await asyncio.wait((disconnected, answering), return_when=asyncio.FIRST_COMPLETED)
            if is_complete():
                await asyncio.wait((answering,))
        finally:
            disconnected.cancel()
            while not answering.done():  # `wait_for` of older Pythons may lose a cancellation
                answering.cancel()
                await asyncio.wait((answering,), timeout=0.1)
        with suppress(asyncio.CancelledError):
            answering.result()


def header_values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def normalize_target(scope: Scope) -> list[str]:
    """Reduce a request target that is a complete URL to its path, and remove slashes at the end. Returns the hosts of
    such a URL."""
    found = ABSOLUTE.fullmatch(scope.get("raw_path") or b"")
    path = unquote(found[2].decode("latin-1")) if found else scope["path"]
    scope["path"] = path.rstrip("/") or "/"
    return [found[1].decode("latin-1")] if found else []


def parse_host(authority: str) -> Optional[Host]:
    """The host in `HOST:PORT`: an address, or a name in lower case without a final dot. None for anything else."""
    found = AUTHORITY.fullmatch(authority)
    if found is None:
        return None
    name = found[2] and found[2].lower().removesuffix(".")
    try:
        return ipaddress.IPv6Address(found[1]) if found[1] else ipaddress.IPv4Address(name)
    except ValueError:
        return name or None


def is_local(authority: str) -> bool:
    """Whether a Host header is an address or `localhost`."""
    host = parse_host(authority)
    return host is not None and (host == "localhost" or not isinstance(host, str))


def is_own(origin: str, hosts: Sequence[str]) -> bool:
    """Whether an Origin header belongs to a page of this machine, on any port, given the request's Host headers."""
    found = ORIGIN.fullmatch(origin)
    host = parse_host(found[1]) if found else None
    if host is None:
        return False
    return is_loopback(str(host)) or host in map(parse_host, hosts)
