"""uvicorn, and how it stops: running requests are finished, new ones get a 503, then the process ends with 0."""

import logging
import socket
import sys
import time
from types import FrameType
from typing import Optional

import uvicorn

from litgpt.errors import UserError
from litgpt.serve.app import App
from litgpt.serve.protocol import Protocol

GRACE = 5.0  # seconds for a client to receive the rest of a finished answer
SWITCH_SECONDS = 0.0005  # how long a Python thread may run; the event loop and the engine alternate at every call


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
