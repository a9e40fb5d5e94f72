"""The text of answers while an engine decodes them: stop strings, and whose turn it is to be shown."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.generate.engine import Engine, Finish, Request
from litgpt.generate.text import TextStream
from litgpt.storage.files import parse_json
from litgpt.text.tokenizer import Tokenizer


@dataclass(eq=False)
class Answer:
    """What follows a prompt, while it grows."""

    number: int  # its place in the order in which the requests came
    request: Request
    stream: TextStream  # its text so far
    n_read: int = 0  # tokens that are in the text

    @property
    def finish(self) -> Optional[Finish]:
        """Why it ended; a stop string counts like a stop token. None while it goes on."""
        return "stop" if self.stream.stopped else self.request.finish

    def new_text(self) -> str:
        """The text that was added since the last call."""
        text = self.stream.push(self.request.ids[self.n_read :])
        self.n_read = len(self.request.ids)
        if self.stream.stopped:
            self.request.cancel()
        return text + (self.stream.close() if self.finish else "")


def decode(
    engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request], stop: Sequence[str] = ()
) -> Iterator[tuple[Answer, str]]:
    """Answer requests, as many at once as the engine has rows, and yield each answer with the text by which it grew.

    An answer comes for the last time when its `finish` is set; the text may then be empty. Requests are taken from the
    iterable as rows become free. `stop` are strings that end an answer; they do not belong to it. Raises `UserError` as
    `Request.check`.
    """
    running: dict[Request, Answer] = {}

    def started() -> Iterator[Request]:
        for number, request in enumerate(requests):
            running[request] = Answer(number, request, TextStream(tokenizer, request.prompt, stop))
            yield request

    for request in engine.grow(started()):
        if request in running:  # a canceled one comes back once more
            answer = running[request]
            text = answer.new_text()
            if answer.finish:
                del running[request]
            yield answer, text


def in_order(decoded: Iterable[tuple[Answer, str]]) -> Iterator[tuple[Answer, str]]:
    """The same, answer after answer: text before an answer's turn is held back, and then comes at once."""
    held, current = dict[int, tuple[Answer, str]](), 0
    for answer, text in decoded:
        before = held.pop(answer.number)[1] if answer.number in held else ""
        held[answer.number] = answer, before + text
        while current in held:
            yield held[current]
            if not held.pop(current)[0].finish:
                break
            current += 1


def stop_strings(stop: Any) -> list[str]:
    """What `--stop` means: a string, several, or a JSON list of them. Raises `UserError` if it is none of these."""
    if isinstance(stop, str):
        try:
            listed = parse_json(stop)
        except ValueError:
            listed = None
        stop = listed if isinstance(listed, list) and all(isinstance(word, str) for word in listed) else [stop]
    words = list(stop) if isinstance(stop, (list, tuple)) else [] if stop is None else [stop]
    if any(not isinstance(word, str) or not word for word in words):
        raise UserError(f"--stop {stop!r}: expected a string or a list of strings, none of them empty.")
    return words
