"""Connections: uvicorn's protocol with limits on their number and on how long a client may stall."""

import asyncio
import json
from typing import Any, Optional

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from litgpt.serve.failure import Failure

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
