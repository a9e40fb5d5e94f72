"""Threads that parse requests, so that a large one delays neither the event loop nor the small ones."""

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, Union

from litgpt.serve.failure import Failure

T = TypeVar("T")
SMALL = 65_536  # the largest small body, in bytes
N_SMALL, N_LARGE = 2, 1  # bodies that are parsed at once


class Lanes:
    """A queue for small bodies and one for large ones. Belongs to the event loop.

    Parsing takes many times the memory of a body; one large body at a time bounds it.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(N_SMALL + N_LARGE, "reader")
        self.small, self.large = asyncio.Semaphore(N_SMALL), asyncio.Semaphore(N_LARGE)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Run `work` in a thread and return its result. A caller that is cancelled while it waits leaves the queue;
        work that has begun is finished, and keeps its place until then.

        Args:
            size: Bytes of the body.
        """
        lane, run = (self.small, catch_failure) if size <= SMALL else (self.large, without_garbage_collector)
        await lane.acquire()
        try:
            future = asyncio.get_running_loop().run_in_executor(self.pool, run, work)
        except BaseException:
            lane.release()
            raise
        future.add_done_callback(lambda _: lane.release())
        result = await asyncio.shield(future)
        if isinstance(result, Failure):
            raise result
        return result

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def catch_failure(work: Callable[[], T]) -> Union[T, Failure]:
    """Return a failure instead of raising it, without its traceback, whose frames hold the body."""
    try:
        return work()
    except Failure as e:
        e.__cause__ = e.__context__ = None
        return e.with_traceback(None)


def without_garbage_collector(work: Callable[[], T]) -> Union[T, Failure]:
    """For a large body: the collector would scan millions of new objects, and block all threads meanwhile."""
    gc.disable()
    try:
        return catch_failure(work)
    finally:
        gc.enable()
