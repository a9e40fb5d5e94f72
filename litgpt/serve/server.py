"""uvicorn: its connections, with limits on their number and on how long a client may stall, and how it stops.

When it stops, running requests are finished, new ones get a 503, then the process ends with 0.
"""

import asyncio
import json
import logging
import socket
import sys
import time
from types import FrameType
from typing import Any, Optional

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from litgpt.errors import UserError
from litgpt.serve.app import App
from litgpt.serve.failure import Failure

GRACE = 5.0  # seconds for a client to receive the rest of a finished answer
SWITCH_SECONDS = 0.0005  # how long a Python thread may run; the event loop and the engine alternate at every call
HEAD_SECONDS = 30.0  # time limit for the head of a request, and for the rest of a body that was answered early
STALL_SECONDS = 60.0  # how long a client may receive nothing of its response
MAX_CONNECTIONS = 500
MANY_CHUNKS, TINY_CHUNK = 1000, 16  # more than MANY_CHUNKS must have TINY_CHUNK bytes each, on average


def connection_limit() -> int:
    """At most half of the file descriptors."""
    try:
        import resource
    except ImportError:  # on Windows
        return MAX_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


class Connection(h11.Connection):
    """Refuses a body in thousands of tiny chunks, each of which takes as long to parse as a megabyte."""

    n_chunks = n_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.n_chunks = self.n_bytes = 0
        elif isinstance(event, h11.Data):
            self.n_chunks += event.chunk_end
            self.n_bytes += len(event.data)
            if self.n_chunks > MANY_CHUNKS and self.n_bytes < TINY_CHUNK * self.n_chunks:
                raise h11.RemoteProtocolError("tiny chunks")
        return event


class Protocol(H11Protocol):
    """Refuses invalid HTTP and too many connections with OpenAI's errors, and drops clients that stall."""

    limit = connection_limit()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Connection(h11.SERVER)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.idle_timer: Optional[asyncio.TimerHandle] = None
        self.stall_timer: Optional[asyncio.TimerHandle] = None
        if len(self.connections) > self.limit:
            self.refuse(Failure(503, "Too many connections. Try again soon.", code="too_many_connections"))
        else:
            self.await_request()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        super().connection_lost(exc)
        for timer in (self.idle_timer, self.stall_timer):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.await_request()

    def await_request(self) -> None:
        """Drop the client unless its next request arrives in time."""
        if self.idle_timer is not None:
            self.idle_timer.cancel()
        self.idle_timer = self.loop.call_later(HEAD_SECONDS, self.drop_idle)

    def drop_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall_timer is not None:
            self.stall_timer.cancel()

    def _should_upgrade(self) -> bool:
        return False  # websockets are not supported

    def send_400_response(self, msg: str) -> None:
        """Invalid HTTP may follow a request that is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.refuse(Failure(400, msg, code="invalid_http"))
        else:
            self.transport.close()

    def refuse(self, failure: Failure) -> None:
        """Send an error, and close the connection."""
        content = json.dumps(failure.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        event = h11.Response(status_code=failure.status, headers=[*headers, *failure.headers.items()])
        for part in (event, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that finishes running requests before it stops."""

    def __init__(self, app: App) -> None:
        super().__init__(
            uvicorn.Config(
                app.guard,  # type: ignore[arg-type]
                http=Protocol,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                ws="none",
                timeout_graceful_shutdown=round(GRACE),
                server_header=False,
            )
        )
        self.app = app
        self.idle_since: Optional[float] = None

    def handle_exit(self, sig: int, frame: Optional[FrameType]) -> None:
        """The first signal lets running requests finish, a second one does not."""
        guard = self.app.guard
        if guard.stopping:
            self.force_exit = self.should_exit = True
        else:
            guard.stopping = True
            print(f"litgpt: stopping after {guard.active} running requests", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        guard = self.app.guard
        if guard.stopping and not self.app.service.worker.n_sequences:
            self.idle_since = self.idle_since or time.monotonic()
            if not guard.active or time.monotonic() - self.idle_since > GRACE:
                self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises `UserError` if the address cannot be used."""
    if not 0 <= port <= 65535:  # glibc would wrap around
        raise UserError(f"--port {port} is not between 0 and 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an ACK
        listening.bind(address)
    except (OSError, UnicodeError) as e:
        raise UserError(f"Cannot listen on --host {host} --port {port}: {getattr(e, 'strerror', None) or e}.") from e
    return listening


def serve(app: App, listening: socket.socket) -> None:
    """Answer until a signal arrives."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("litgpt.serve").setLevel(logging.INFO)
    sys.setswitchinterval(SWITCH_SECONDS)
    Server(app).run(sockets=[listening])
