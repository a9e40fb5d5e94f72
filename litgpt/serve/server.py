"""uvicorn, and how it stops: what is under way is finished, new requests hear 503, then the process ends with 0."""

import logging
import socket
import sys
import time
from types import FrameType
from typing import Optional

import uvicorn

from litgpt.errors import UserError
from litgpt.serve.app import Service
from litgpt.serve.protocol import Protocol

GRACE = 5.0  # seconds for a client to take the rest of an answer that is finished
SWITCH = 0.0005  # seconds after which Python's threads take turns; the loop and the engine ask for one at every call


class Server(uvicorn.Server):
    """A server that drains.

    Args:
        service: Knows what is under way.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.idle_since: Optional[float] = None

    def handle_exit(self, sig: int, frame: Optional[FrameType]) -> None:
        """The first signal lets what is under way finish, a second one does not."""
        gate = self.service.gate
        if gate is None or gate.stopping:
            self.force_exit = self.should_exit = True
        else:
            gate.stopping = True
            print(f"litgpt: stopping; {gate.active} requests are under way", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        gate = self.service.gate
        if gate is not None and gate.stopping and not self.service.worker.texts:
            self.idle_since = self.idle_since or time.monotonic()
            if not gate.active or time.monotonic() - self.idle_since > GRACE:
                self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; nobody is answered yet. Raises `UserError` where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError, UnicodeError) as e:
        raise UserError(f"--host {host} --port {port} cannot be used: {getattr(e, 'strerror', None) or e}.") from e
    return made


def configure(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=Protocol,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=round(GRACE),
        server_header=False,
    )


def serve(app: object, service: Service, listening: socket.socket) -> None:
    """Answer until a signal comes."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("litgpt.serve").setLevel(logging.INFO)
    sys.setswitchinterval(SWITCH)
    Server(configure(app), service).run(sockets=[listening])
