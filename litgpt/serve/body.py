"""The body of a request while it arrives, within limits of size and time."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from litgpt.serve.failure import Failure

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
BODY_SECONDS = 30.0  # time limit for a body to arrive
SMALL = 65_536  # the largest small body, in bytes
N_BODIES = 16  # how many bodies of the largest size may be in memory at once


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
