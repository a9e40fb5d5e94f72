"""Texts in an engine, read as words: stop strings, and whose turn it is to be shown."""

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
    """What follows a prompt, while it grows.

    Args:
        number: Its place in the order in which the texts came.
        text: In the engine.
        stream: Its words so far.
    """

    number: int
    text: Request
    stream: TextStream
    n_read: int = 0

    @property
    def finish(self) -> Optional[Finish]:
        """Why it ended; a stop string counts like a stop token. None while it goes on."""
        return "stop" if self.stream.stopped else self.text.finish

    def read(self) -> str:
        """The words that came since the last call."""
        piece = self.stream.push(self.text.ids[self.n_read :])
        self.n_read = len(self.text.ids)
        if self.stream.stopped:
            self.text.cancel()
        return piece + (self.stream.close() if self.finish else "")


def decode(
    engine: Engine, tokenizer: Tokenizer, texts: Iterable[Request], stop: Sequence[str] = ()
) -> Iterator[tuple[Answer, str]]:
    """Answer texts, as many at once as the engine has rows, and yield each new piece with its answer.

    The last piece of an answer comes when its `finish` is set; it may be empty. Texts are taken from the iterable as
    places become free.

    Args:
        stop: Strings that end an answer; they are left out.

    Raises:
        UserError: as `Text.check`.
    """
    source, running, n_begun, more = iter(texts), dict[Request, Answer](), 0, True
    while more or engine.busy:
        while more and len(running) < len(engine.rows):
            text = next(source, None)
            if text is None:
                more = False
            else:
                running[engine.submit(text)] = Answer(n_begun, text, TextStream(tokenizer, text.prompt, stop))
                n_begun += 1
        for text in engine.step() if engine.busy else ():
            if text in running:  # a cancelled one comes back once more
                answer = running[text]
                piece = answer.read()
                if answer.finish:
                    del running[text]
                yield answer, piece


def in_order(decoded: Iterable[tuple[Answer, str]]) -> Iterator[tuple[Answer, str]]:
    """The same, answer after answer: what comes before an answer's turn is held back, and comes as one piece."""
    held, now = dict[int, tuple[Answer, str]](), 0
    for answer, piece in decoded:
        before = held.pop(answer.number)[1] if answer.number in held else ""
        held[answer.number] = answer, before + piece
        while now in held:
            yield held[now]
            if not held.pop(now)[0].finish:
                break
            now += 1


def stop_strings(stop: Any) -> list[str]:
    """What `--stop` means: a text, several, or a JSON list of them.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(stop, str):
        try:
            listed = parse_json(stop)
        except ValueError:
            listed = None
        stop = listed if isinstance(listed, list) and all(isinstance(word, str) for word in listed) else [stop]
    words = list(stop) if isinstance(stop, (list, tuple)) else [] if stop is None else [stop]
    if any(not isinstance(word, str) or not word for word in words):
        raise UserError(f"--stop {stop!r}: a text or a list of texts is wanted, none of them empty.")
    return words
