"""Threads that read requests, so that a large one holds up neither the event loop nor the small ones."""

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, Union

from litgpt.serve.failure import Failure

T = TypeVar("T")
SMALL = 65_536  # bytes of a body that count as few
N_SMALL, N_LARGE = 2, 1  # bodies that are read at once


class Lanes:
    """A queue for small bodies and one for large ones. Belongs to the event loop.

    What is read takes many times the memory of the body: one large body at a time keeps it within bounds.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(N_SMALL + N_LARGE, "reader")
        self.small, self.large = asyncio.Semaphore(N_SMALL), asyncio.Semaphore(N_LARGE)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of work in a thread, for a body of so many bytes. Whoever is cancelled while it waits leaves the
        queue; what has begun is finished, and keeps its place until then."""
        lane, how = (self.small, caught) if size <= SMALL else (self.large, uncollected)
        await lane.acquire()
        try:
            future = asyncio.get_running_loop().run_in_executor(self.pool, how, work)
        except BaseException:
            lane.release()
            raise
        future.add_done_callback(lambda _: lane.release())
        found = await asyncio.shield(future)
        if isinstance(found, Failure):
            raise found
        return found

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def caught(work: Callable[[], T]) -> Union[T, Failure]:
    """A failure as a result: without the traceback, whose frames hold what was read."""
    try:
        return work()
    except Failure as e:
        e.__cause__ = e.__context__ = None
        return e.with_traceback(None)


def uncollected(work: Callable[[], T]) -> Union[T, Failure]:
    """Without the collector of cycles: it would look at millions of new objects, and hold up all threads meanwhile."""
    gc.disable()
    try:
        return caught(work)
    finally:
        gc.enable()
