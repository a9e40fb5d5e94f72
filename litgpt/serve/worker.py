"""The thread that owns the engine, and the requests that it answers.

Their sequences reach it through a queue; tokens go back to the event loop.
"""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Optional

from litgpt.generate.answers import TextStream
from litgpt.generate.engine import Engine, Request
from litgpt.serve.failure import Failure
from litgpt.text.tokenizer import Tokenizer

MAX_FAILURES = 5  # consecutive failures without an answer, after which the server no longer counts as healthy


class Token(NamedTuple):
    """A token of an answer, with log-probabilities if the request asks for them."""

    id: int
    logprob: Optional[float]
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    """The next part of one of a request's answers."""

    index: int  # the number of the answer
    text: str  # may be empty: a character or a stop string may not be complete yet
    tokens: Sequence[Token]
    finish: Optional[str]  # why the answer ends here; None while it goes on


@dataclass(frozen=True)
class TokenEvent:
    """What a step of the engine did to one sequence."""

    generation: "Generation"
    index: int
    tokens: list[Token]
    finish: Optional[str]  # as in `Request`, or `failed` or `refused` if the engine failed


@dataclass(eq=False)
class Generation:
    """A request that is being answered. It is small, however large its body was.

    Belongs to the event loop once it is parsed, except for `sent` and `closed`.
    """

    model: str
    tokenizer: Tokenizer
    sequences: Sequence[Request]  # `n` for each prompt
    streams: Sequence[TextStream]  # turn the tokens of each sequence into text and find its stop strings
    n_prompt: int  # tokens of all prompts
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    began: float  # when the request arrived, by the clock of the event loop
    timeout: float  # seconds that it may take from then on, its time in the queue included
    n_new: int = 0  # tokens of all answers so far
    cancelled: bool = False
    started: bool = False  # whether the metrics include its first token
    ended: bool = False  # whether they include its end

    def __post_init__(self) -> None:
        self.events: asyncio.Queue[Optional[TokenEvent]] = asyncio.Queue()  # None: the time is up
        self.sent = [0] * len(self.sequences)  # tokens that the worker has sent back, by sequence
        self.closed = [False] * len(self.sequences)  # whether it has sent back the end
        for i, sequence in enumerate(self.sequences):
            sequence.tag = self, i

    def cancel(self) -> None:
        """Free the places of all sequences and their memory: a cancelled task may be kept for a while."""
        for sequence in self.sequences:
            sequence.cancel()
        self.cancelled, self.events = True, asyncio.Queue()
        self.sequences = self.streams = ()

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answers as they are generated, until all have ended. Raises `Failure` if the request took too long or the
        engine failed."""
        going = set(range(len(self.sequences)))
        timer = asyncio.get_running_loop().call_at(self.began + self.timeout, self.events.put_nowait, None)
        try:
            while going:
                if (event := await self.events.get()) is None:
                    raise timed_out(self.timeout)
                if event.finish == "failed":
                    raise Failure(500, "The model failed. See the server's log.")
                if event.finish == "refused":
                    raise engine_failed()
                if event.index in going:
                    delta = self.delta(event)
                    if delta.finish:
                        going.discard(event.index)
                        self.sequences[event.index].cancel()  # a stop string ends it before the engine does
                    yield delta
        finally:
            timer.cancel()
            self.cancel()

    def delta(self, event: TokenEvent) -> Delta:
        stream, text, taken = self.streams[event.index], "", []
        for token in event.tokens:
            text += stream.push([token.id])
            taken.append(token)
            if stream.stopped:
                break
        if event.finish and not stream.stopped:
            text += stream.close()
        self.n_new += len(taken)
        return Delta(event.index, text, taken, "stop" if stream.stopped else event.finish)


class Worker:
    """Decodes the sequences of all requests in one batch, in a thread of its own.

    After a failure all sequences get an error, and the engine is tested with a short sequence. If that fails too, as
    after an error that a device does not survive, everything from then on is refused.

    Args:
        engine: Belongs to the thread.
        max_sequences: How many sequences may exist at once, including those that wait.
        on_events: Called in the event loop with what a step did.
    """

    def __init__(self, engine: Engine, max_sequences: int, on_events: Callable[[Sequence[TokenEvent]], None]) -> None:
        self.engine, self.max_sequences, self.on_events = engine, max_sequences, on_events
        self.inbox: queue.SimpleQueue[Optional[Sequence[Request]]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.n_sequences = 0  # that have not ended; belongs to the event loop
        self.open: set[Request] = set()  # the same sequences, as the thread knows them
        self.failures, self.consecutive_failures, self.last_error = 0, 0, ""
        self.broken: Optional[str] = None  # why nothing can be answered any more

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        self.inbox.put(None)
        self.thread.join(timeout=10)

    @property
    def problem(self) -> Optional[str]:
        """Why requests are not answered, or are unlikely to be; None if all is well."""
        if self.broken is not None:
            return self.broken
        if not self.thread.is_alive():
            return "its thread has ended"
        if self.consecutive_failures >= MAX_FAILURES:
            return f"{self.consecutive_failures} failures in a row, the last one: {self.last_error}"
        return None

    @property
    def running(self) -> int:
        return sum(sequence is not None and not sequence.finish for sequence in self.engine.rows)

    @property
    def waiting(self) -> int:
        return max(0, self.n_sequences - self.running)

    def submit(self, generation: Generation) -> None:
        """Decode the sequences of a request, which have been checked. Raises `Failure` if they cannot wait."""
        sequences = generation.sequences
        if self.broken is not None or not self.thread.is_alive():
            raise engine_failed()
        if self.n_sequences + len(sequences) > self.max_sequences:
            message = f"Too many requests wait already (at most {self.max_sequences} answers). Try again soon."
            raise Failure(429, message)
        self.n_sequences += len(sequences)
        self.inbox.put(sequences)

    def work(self) -> None:
        """The loop of the thread."""
        while True:
            try:
                if not self.receive():
                    return
                self.step()
                continue
            except BaseException as e:
                with suppress(Exception):  # the memory or the disk may be full
                    traceback.print_exc(file=sys.stderr)
                self.last_error, survivable = in_one_line(e), isinstance(e, Exception)
            self.recover(survivable)  # outside the handler, where no traceback holds tensors

    def receive(self) -> bool:
        """Give new sequences to the engine, and wait for some if it has nothing to do. Returns whether to go on."""
        while True:
            try:
                sequences = self.inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if sequences is None:
                return False
            self.open.update(sequences)
            if self.broken is not None:
                self.end_all("refused")
                continue
            for sequence in sequences:
                self.engine.submit(sequence)

    def step(self) -> None:
        sequences = self.engine.step()
        events = [self.event(sequence) for sequence in sequences]
        for sequence, event in zip(sequences, events):
            if event is not None and event.finish:  # not `sequence.finish`: it may be cancelled at any moment
                self.open.discard(sequence)
                if event.finish in ("stop", "length"):
                    self.consecutive_failures = 0
        self.send([event for event in events if event is not None])

    def recover(self, survivable: bool) -> None:
        """Start over after a failure, without the sequences that were open. If that is not possible, report it once."""
        self.failures += 1
        self.consecutive_failures += 1
        self.engine.clear()
        if survivable and self.engine_works():
            self.end_all("failed")
            return
        self.broken = self.last_error
        self.end_all("refused")
        message = f"litgpt: the model can no longer answer ({self.last_error}). Restart the server."
        print(message, file=sys.stderr, flush=True)

    def engine_works(self) -> bool:
        """Whether the engine can answer a short sequence."""
        try:
            sequence = self.engine.submit(Request([0], 1))
            while not sequence.finish:
                self.engine.step()
        except BaseException as e:
            self.last_error = in_one_line(e)
            return False
        finally:
            self.engine.clear()
        return True

    def end_all(self, finish: str) -> None:
        """End all open sequences without an answer."""
        events = []
        for sequence in self.open:
            generation, index = sequence.tag
            generation.closed[index] = True
            sequence.tag = None
            events.append(TokenEvent(generation, index, [], finish))
        self.open.clear()
        self.send(events)

    @staticmethod
    def event(sequence: Request) -> Optional[TokenEvent]:
        """What is new in a sequence; None if its end was sent already."""
        if sequence.tag is None:
            return None
        generation, index = sequence.tag
        start, end = generation.sent[index], len(sequence.ids)
        if sequence.logprobs is None:
            tokens = [Token(id, None, []) for id in sequence.ids[start:end]]
        else:
            found = zip(sequence.ids, sequence.token_logprobs, sequence.top_logprobs)
            tokens = [Token(*values) for values in islice(found, start, end)]
        generation.sent[index] = end
        finish = sequence.finish  # it may be cancelled at any moment
        if finish is not None:
            generation.closed[index] = True
            sequence.tag = None  # else both would wait for the garbage collector
        return TokenEvent(generation, index, tokens, finish)

    def send(self, events: Sequence[TokenEvent]) -> None:
        if events and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.deliver, events)

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """In the event loop: pass on what a step did."""
        for event in events:
            self.n_sequences -= event.finish is not None
            if not event.generation.cancelled:
                event.generation.events.put_nowait(event)
        self.on_events(events)


def in_one_line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def timed_out(seconds: float) -> Failure:
    return Failure(504, f"The answer took longer than {seconds:g} seconds (--timeout).")


def engine_failed() -> Failure:
    return Failure(503, "The model can no longer answer. See the server's log.", code="engine_failed")
