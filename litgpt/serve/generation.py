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
    """The next part of one of a request's answers.

    Args:
        index: The number of the answer.
        text: May be empty: a character or a stop string may not be complete yet.
        finish: Why the answer ends here; None while it goes on.
    """

    index: int
    text: str
    tokens: Sequence[Token]
    finish: Optional[str]


@dataclass(frozen=True)
class TokenEvent:
    """What a step of the engine did to one sequence.

    Args:
        finish: As in `Request`, or `failed` or `refused` if the engine failed.
    """

    generation: "Generation"
    index: int
    tokens: list[Token]
    finish: Optional[str]


@dataclass
class GenerationRequest:
    """A parsed request. It is small, however large its body was.

    Args:
        sequences: `n` for each prompt.
        streams: Turn the tokens of each sequence into text and find its stop strings.
        n_prompt: Tokens of all prompts.
    """

    model: str
    tokenizer: Tokenizer
    sequences: Sequence[Request]
    streams: Sequence[TextStream]
    n_prompt: int
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool


class Generation:
    """A request that is being answered. Belongs to the event loop, except for `sent` and `closed`.

    Args:
        began: When the request arrived, by the clock of the loop.
        timeout: Seconds that the request may take from then on, its time in the queue included.
    """

    def __init__(self, request: GenerationRequest, began: float, timeout: float) -> None:
        self.request, self.began, self.timeout = request, began, timeout
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Optional[TokenEvent]] = asyncio.Queue()  # None: the time is up
        self.sent = [0] * len(request.sequences)  # tokens that the worker has sent back, by sequence
        self.closed = [False] * len(request.sequences)  # whether it has sent back the end
        self.n_new = 0  # tokens of all answers so far
        self.cancelled = False
        self.started = self.ended = False  # whether the metrics include its first token, and its end
        for i, sequence in enumerate(request.sequences):
            sequence.tag = self, i

    def cancel(self) -> None:
        """Free the places of all sequences and their memory: a cancelled task may be kept for a while."""
        for sequence in self.request.sequences:
            sequence.cancel()
        self.cancelled, self.events = True, asyncio.Queue()
        self.request.sequences = self.request.streams = ()

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answers as they are generated, until all have ended.

        Raises:
            Failure: The request took too long, or the engine failed.
        """
        going = set(range(len(self.request.sequences)))
        timer = self.loop.call_at(self.began + self.timeout, self.events.put_nowait, None)
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
                        self.request.sequences[event.index].cancel()  # a stop string ends it before the engine does
                    yield delta
        finally:
            timer.cancel()
            self.cancel()

    def delta(self, event: TokenEvent) -> Delta:
        stream, text, taken = self.request.streams[event.index], "", []
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
