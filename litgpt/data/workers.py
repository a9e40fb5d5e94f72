"""Processes that tokenize, for data sets that are worth it."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Optional

from litgpt.errors import UserError

FIRST = 4  # batches that this process works on before it starts others
PARALLEL = "TOKENIZERS_PARALLELISM"  # the environment variable that turns the tokenizers' own threads on or off

task: Optional[Callable[..., Any]] = None  # what a forked process inherits, so that nothing has to be pickled


class Workers:
    """Applies a function to batches, in order: in this process at first, then in one process per core.

    Rendering a row is Python and takes longer than tokenizing it, so threads would not help.

    Args:
        work: The function. Its arguments and results are pickled.
    """

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work
        self.n_done = 0
        self.n_processes = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        self.pool: Optional[ProcessPoolExecutor] = None
        self.parallel = os.environ.get(PARALLEL)

    def __enter__(self) -> "Workers":
        return self

    def map(self, batches: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results, in order. Raises `UserError` if a process is killed."""
        batches = iter(batches)
        n_first = None if self.n_processes < 2 else max(0, FIRST - self.n_done)
        for batch in itertools.islice(batches, n_first):
            self.n_done += 1
            yield self.work(*batch)
        waiting: deque = deque()
        try:
            for batch in batches:
                self.pool = self.pool or self.start()
                waiting.append(self.pool.submit(run, *batch))
                if len(waiting) > 2 * self.n_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as e:
            raise UserError("A process that tokenizes was killed, probably for lack of memory.") from e

    def start(self) -> ProcessPoolExecutor:
        global task
        task = self.work
        os.environ[PARALLEL] = "false"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
            context = multiprocessing.get_context("fork")
            pool = ProcessPoolExecutor(self.n_processes, context, prepare, (os.getpid(),))
            pool.submit(int).result()  # starts all processes while the warning is off
        return pool

    def __exit__(self, *error: object) -> None:
        global task
        task = None
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            os.environ.pop(PARALLEL)
            if self.parallel is not None:
                os.environ[PARALLEL] = self.parallel


def run(*batch: Any) -> Any:
    assert task is not None
    return task(*batch)


def prepare(parent: int) -> None:
    """Leave signals to the parent, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
