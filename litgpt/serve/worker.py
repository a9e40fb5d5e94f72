"""The thread that owns the engine. Requests come to it through a queue; tokens go back to the event loop."""

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

from litgpt.generate.engine import Engine, Text
from litgpt.generate.text import TextStream
from litgpt.serve.failure import Failure

Top = list[tuple[int, float]]


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
class News:
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
        texts: Sequence[Text],
        streams: Sequence[TextStream],
        model: str,
        n_prompt: int,
        began: float,
        seconds: float,
    ) -> None:
        self.texts, self.streams = texts, streams
        self.model, self.n_prompt, self.began, self.seconds = model, n_prompt, began, seconds
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[Optional[News]] = asyncio.Queue()  # None: the client went away
        self.sent = [0] * len(texts)  # of each text, the tokens that the worker has sent back
        self.closed = [False] * len(texts)  # whose end the worker has sent back
        self.n_new = 0  # tokens of all answers so far
        self.over: Callable[[], object] = lambda: None  # called once nobody listens any more
        self.noted = self.timed = False  # whether its first token, and its end, were counted
        for i, text in enumerate(texts):
            text.tag = self, i

    def cancel(self) -> None:
        """Free the places of all texts."""
        self.over()
        for text in self.texts:
            text.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answers as they come, until all have ended or the client goes away.

        Raises:
            Failure: it took too long, or the engine failed.
        """
        going = set(range(len(self.texts)))
        try:
            while going:
                try:
                    news = await asyncio.wait_for(self.news.get(), max(0, self.began + self.seconds - self.loop.time()))
                except asyncio.TimeoutError:
                    raise Failure(504, f"The answer took longer than {self.seconds:g} seconds (--timeout).") from None
                if news is None:
                    return
                if news.finish == "failed":
                    raise Failure(500, "The model failed; the server's log says why.")
                if news.index in going:
                    piece = self.piece(news)
                    if piece.finish:
                        going.discard(news.index)
                        self.texts[news.index].cancel()  # a stop string ends it earlier than the engine would
                    yield piece
        finally:
            self.cancel()

    def piece(self, news: News) -> Piece:
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


class Worker:
    """Decodes the texts of all jobs in one batch, in a thread of its own.

    Args:
        make_engine: Called in the beginning, and again after a failure.
        most: So many texts may be there at once, those that wait included.
    """

    def __init__(self, make_engine: Callable[[], Engine], most: int) -> None:
        self.make_engine, self.most = make_engine, most
        self.engine = make_engine()
        self.inbox: queue.SimpleQueue[Optional[Sequence[Text]]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.texts = 0  # not ended yet; counted in the event loop
        self.on_news: Callable[[Sequence[News]], None] = lambda news: None

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        self.inbox.put(None)
        self.thread.join(timeout=10)

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    @property
    def load(self) -> Load:
        running = sum(text is not None and not text.finish for text in self.engine.rows)
        return Load(running, max(0, self.texts - running))

    def submit(self, job: Job) -> None:
        """Take a job, whose texts were checked.

        Raises:
            Failure: too many wait already.
        """
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
                self.send([self.news(text) for text in self.engine.step()])
            except Exception:
                traceback.print_exc(file=sys.stderr)
                broken, self.engine = self.engine, self.make_engine()
                left = [*broken.waiting, *(text for text in broken.rows if text is not None)]
                for text in left:
                    text.finish = text.finish or "cancelled"
                self.send([self.news(text, failed=True) for text in left])

    def take(self) -> bool:
        """Give new texts to the engine; waits for one where there is nothing else to do. Whether to go on."""
        while True:
            try:
                texts = self.inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if texts is None:
                return False
            for text in texts:
                self.engine.submit(text)

    @staticmethod
    def news(text: Text, failed: bool = False) -> Optional[News]:
        job, index = text.tag
        if job.closed[index]:
            return None
        start = job.sent[index]
        tokens = []
        for i, token in enumerate(text.ids[start:], start):
            wanted = text.logprobs is not None
            tokens.append(
                Token(token, text.token_logprobs[i] if wanted else None, text.top_logprobs[i] if wanted else [])
            )
        job.sent[index] = len(text.ids)
        finish = "failed" if failed else text.finish
        job.closed[index] = finish is not None
        return News(job, index, tokens, finish)

    def send(self, news: Sequence[Optional[News]]) -> None:
        known = [n for n in news if n is not None]
        if known and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.deliver, known)

    def deliver(self, news: Sequence[News]) -> None:
        """In the event loop: hand on what came of a step."""
        for n in news:
            self.texts -= n.finish is not None
            n.job.news.put_nowait(n)
        self.on_news(news)
