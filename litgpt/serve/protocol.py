"""How connections are treated: uvicorn's protocol, with limits of time and number."""

import asyncio
import json
from typing import Any, Optional

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from litgpt.serve.failure import Failure

HEAD_SECONDS = 30.0  # in which the head of a request must have come, and the rest of what was answered early must end
STALL_SECONDS = 60.0  # for which a client may take nothing of an answer
MOST = 500  # connections
MANY_CHUNKS, TINY_CHUNK = 1000, 16  # bytes of a chunk, on average, that so many must have at least


def most_connections() -> int:
    """As many as there can be with half of the file descriptors."""
    try:
        import resource
    except ImportError:  # on Windows
        return MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, soft // 2)


class Connection(h11.Connection):
    """Refuses a body in thousands of tiny chunks: reading one takes as long as reading a megabyte."""

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
    """Refuses in OpenAI's form what is not HTTP, or one connection too many, and leaves clients that do not go on."""

    most = most_connections()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Connection(h11.SERVER)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.waiting: Optional[asyncio.TimerHandle] = None
        self.stalled: Optional[asyncio.TimerHandle] = None
        if len(self.connections) > self.most:
            self.refuse(Failure(503, "Too many connections. Try again soon.", code="too_many_connections"))
        else:
            self.wait()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        super().connection_lost(exc)
        for timer in (self.waiting, self.stalled):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.wait()

    def wait(self) -> None:
        """Give the client some seconds for its next request."""
        if self.waiting is not None:
            self.waiting.cancel()
        self.waiting = self.loop.call_later(HEAD_SECONDS, self.waited)

    def waited(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled is not None:
            self.stalled.cancel()

    def _should_upgrade(self) -> bool:
        return False  # to websockets, which there are none of

    def send_400_response(self, msg: str) -> None:
        """What the client sends is not HTTP; it may be in the midst of a request that is being answered."""
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
