"""The thread that owns the engine. Requests come to it through a queue; tokens go back to the event loop."""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Optional

from litgpt.generate.engine import Engine, Request
from litgpt.generate.text import TextStream
from litgpt.serve.failure import Failure

Top = list[tuple[int, float]]
IN_A_ROW = 5  # failures, with no answer in between, after which the server no longer counts as healthy


class Token(NamedTuple):
    """One token of an answer, with what `Text` knows of it where log-probabilities are wanted."""

    id: int
    logprob: Optional[float]
    top: Top


@dataclass(frozen=True)
class Piece:
    """What comes next of one of a request's answers.

    Args:
        index: The number of the answer.
        text: May be empty: a character or a stop string may not be whole yet.
        finish: Why the answer ends with this; None while it goes on.
    """

    index: int
    text: str
    tokens: Sequence[Token]
    finish: Optional[str]


@dataclass(frozen=True)
class TokenEvent:
    """What a step of the engine did to one text."""

    job: "Job"
    index: int
    tokens: list[Token]
    finish: Optional[str]


class Job:
    """A request: its texts, and what comes of them. Belongs to the event loop, except for `sent` and `closed`.

    Args:
        texts: Its answers.
        streams: Make text of each answer's tokens, and know its stop strings.
        model: The name of the model that was asked for.
        n_prompt: Tokens of all prompts.
        began: When the request came, by the clock of the loop.
        seconds: How long it may take from then on, the wait for a place included.
    """

    def __init__(
        self,
        texts: Sequence[Request],
        streams: Sequence[TextStream],
        model: str,
        n_prompt: int,
        began: float,
        seconds: float,
    ) -> None:
        self.texts: Sequence[Request] = texts
        self.streams: Sequence[TextStream] = streams
        self.model, self.n_prompt, self.began, self.seconds = model, n_prompt, began, seconds
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[Optional[TokenEvent]] = asyncio.Queue()  # None: time is over
        self.sent = [0] * len(texts)  # of each text, the tokens that the worker has sent back
        self.closed = [False] * len(texts)  # whose end the worker has sent back
        self.n_new = 0  # tokens of all answers so far
        self.over = False  # nobody listens any more
        self.noted = self.timed = False  # whether its first token, and its end, were counted
        for i, text in enumerate(texts):
            text.tag = self, i

    def cancel(self) -> None:
        """Free the places of all texts, and what the job holds: a task that was cancelled may be kept for a while."""
        for text in self.texts:
            text.cancel()
        self.over, self.news = True, asyncio.Queue()
        self.texts, self.streams = (), ()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answers as they come, until all have ended.

        Raises:
            Failure: it took too long, or the engine failed.
        """
        going = set(range(len(self.texts)))
        timer = self.loop.call_at(self.began + self.seconds, self.news.put_nowait, None)
        try:
            while going:
                if (news := await self.news.get()) is None:
                    raise too_slow(self.seconds)
                if news.finish == "failed":
                    raise Failure(500, "The model failed; the server's log says why.")
                if news.finish == "refused":
                    raise no_engine()
                if news.index in going:
                    piece = self.piece(news)
                    if piece.finish:
                        going.discard(news.index)
                        self.texts[news.index].cancel()  # a stop string ends it earlier than the engine would
                    yield piece
        finally:
            timer.cancel()
            self.cancel()

    def piece(self, news: TokenEvent) -> Piece:
        stream, text, taken = self.streams[news.index], "", []
        for token in news.tokens:
            text += stream.push([token.id])
            taken.append(token)
            if stream.stopped:
                break
        finish = "stop" if stream.stopped else news.finish
        if finish and not stream.stopped:
            text += stream.close()
            finish = "stop" if stream.stopped else finish
        self.n_new += len(taken)
        return Piece(news.index, text, taken, finish)


@dataclass
class Load:
    """How busy the engine is: texts in its rows, and texts that wait for one."""

    running: int = 0
    waiting: int = 0


def too_slow(seconds: float) -> Failure:
    return Failure(504, f"The answer took longer than {seconds:g} seconds (--timeout).")


def no_engine() -> Failure:
    return Failure(503, "The model can no longer answer; the server's log says why.", code="engine_failed")


class Worker:
    """Decodes the texts of all jobs in one batch, in a thread of its own.

    After a failure all texts that are there get an error, and the engine has to answer a small text. If it cannot, as
    after an error that a device does not survive, everything from then on is refused.

    Args:
        engine: Belongs to the thread.
        most: So many texts may be there at once, those that wait included.

    Attributes:
        failures: How often something has failed.
        broken: Why nothing can be answered any more.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine, self.most = engine, most
        self.inbox: queue.SimpleQueue[Optional[Sequence[Request]]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.texts = 0  # not ended yet; counted in the event loop
        self.open: set[Request] = set()  # the same, as the thread knows them
        self.failures, self.in_a_row, self.last = 0, 0, ""
        self.broken: Optional[str] = None
        self.on_news: Callable[[Sequence[TokenEvent]], None] = lambda news: None

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        self.inbox.put(None)
        self.thread.join(timeout=10)

    @property
    def trouble(self) -> Optional[str]:
        """Why requests are not answered, or are not likely to be; None if all is well."""
        if self.broken is not None:
            return self.broken
        if not self.thread.is_alive():
            return "its thread has ended"
        return f"{self.in_a_row} failures in a row, the last one: {self.last}" if self.in_a_row >= IN_A_ROW else None

    @property
    def load(self) -> Load:
        running = sum(text is not None and not text.finish for text in self.engine.rows)
        return Load(running, max(0, self.texts - running))

    def submit(self, job: Job) -> None:
        """Take a job, whose texts were checked.

        Raises:
            Failure: too many wait already, or there is nothing that answers.
        """
        if self.broken is not None or not self.thread.is_alive():
            raise no_engine()
        if self.texts + len(job.texts) > self.most:
            raise Failure(429, f"Too many requests wait already (at most {self.most} texts at once). Try again soon.")
        self.texts += len(job.texts)
        self.inbox.put(job.texts)

    def work(self) -> None:
        """The thread: as long as there is something to do, step."""
        while True:
            try:
                if not self.take():
                    return
                self.step()
                continue
            except BaseException as e:
                with suppress(Exception):  # of a full memory or disk
                    traceback.print_exc(file=sys.stderr)
                self.last, survivable = in_words(e), isinstance(e, Exception)
            self.give_up(survivable)  # out here, where the traceback no longer holds tensors

    def take(self) -> bool:
        """Give new texts to the engine; waits for one where there is nothing else to do. Whether to go on."""
        while True:
            try:
                texts = self.inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if texts is None:
                return False
            self.open.update(texts)
            if self.broken is not None:
                self.fail("refused")
                continue
            for text in texts:
                self.engine.submit(text)

    def step(self) -> None:
        texts = self.engine.step()
        news = [self.news(text) for text in texts]
        for text, n in zip(texts, news):
            if n is not None and n.finish:  # not the text's own: it may be cancelled at any moment
                self.open.discard(text)
                self.in_a_row = 0 if n.finish in ("stop", "length") else self.in_a_row
        self.send(news)

    def give_up(self, survivable: bool) -> None:
        """Begin anew after a failure, without the texts that were there. If that is not possible, say so once."""
        self.failures += 1
        self.in_a_row += 1
        self.engine.clear()
        if survivable and self.answers():
            self.fail("failed")
            return
        self.broken = self.last
        self.fail("refused")
        print(f"litgpt: the model can no longer answer ({self.last}). Restart the server.", file=sys.stderr, flush=True)

    def answers(self) -> bool:
        """Whether the engine can still answer a small text."""
        try:
            text = self.engine.submit(Request([0], 1))
            while not text.finish:
                self.engine.step()
        except BaseException as e:
            self.last = in_words(e)
            return False
        finally:
            self.engine.clear()
        return True

    def fail(self, how: str) -> None:
        """Tell all jobs that they get no answer."""
        news = []
        for text in self.open:
            job, index = text.tag
            job.closed[index] = True
            text.tag = None
            news.append(TokenEvent(job, index, [], how))
        self.open.clear()
        self.send(news)

    @staticmethod
    def news(text: Request) -> Optional[TokenEvent]:
        if text.tag is None:
            return None
        job, index = text.tag
        start = job.sent[index]
        tokens = []
        for i, token in enumerate(text.ids[start:], start):
            wanted = text.logprobs is not None
            tokens.append(
                Token(token, text.token_logprobs[i] if wanted else None, text.top_logprobs[i] if wanted else [])
            )
        job.sent[index] = len(text.ids)
        finish = text.finish  # it may be cancelled at any moment
        if finish is not None:
            job.closed[index] = True
            text.tag = None  # else both would wait for the collector of cycles
        return TokenEvent(job, index, tokens, finish)

    def send(self, news: Sequence[Optional[TokenEvent]]) -> None:
        known = [n for n in news if n is not None]
        if known and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.deliver, known)

    def deliver(self, news: Sequence[TokenEvent]) -> None:
        """In the event loop: hand on what came of a step."""
        for n in news:
            self.texts -= n.finish is not None
            if not n.job.over:
                n.job.news.put_nowait(n)
        self.on_news(news)


def in_words(error: BaseException) -> str:
    """An error in one short line."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
