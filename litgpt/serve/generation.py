"""The sequences of one HTTP request, and what has been generated of them so far."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

from litgpt.generate.engine import Request
from litgpt.generate.text import TextStream
from litgpt.serve.failure import Failure
from litgpt.text.tokenizer import Tokenizer


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


def timed_out(seconds: float) -> Failure:
    return Failure(504, f"The answer took longer than {seconds:g} seconds (--timeout).")


def engine_failed() -> Failure:
    return Failure(503, "The model can no longer answer. See the server's log.", code="engine_failed")
