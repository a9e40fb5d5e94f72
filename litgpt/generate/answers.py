"""The text of answers while an engine decodes them: stop strings, and whose turn it is to be shown."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Optional, Union

from litgpt.errors import UserError
from litgpt.generate.engine import Engine, Finish, Request
from litgpt.generate.speculative import Speculation
from litgpt.storage.files import parse_json
from litgpt.text.tokenizer import Tokenizer

WINDOW = 8  # tokens that are decoded again with the next one
UNFINISHED = 3  # maximum bytes of an incomplete character; each may show as a replacement character


class TextStream:
    """Turns the tokens of an answer into text while they come.

    An incomplete character is held back, and so is what may become a stop string, which ends the answer and does not
    belong to it. A token takes the same time wherever it is in an answer, and whatever the length of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = self.tail(prompt)  # the context for the next token: how it is written may depend on them
        self.decoded = tokenizer.decode(self.ids)
        self.shown = self.decoded  # the part of `decoded` that was released, or belongs to the prompt
        self.stop = [word for word in stop if word]
        self.pending, self.released = "", list[str]()
        self.stopped = False  # whether a stop string came; no text follows after that

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.released)

    def tail(self, ids: Sequence[int]) -> list[int]:
        """The last of some tokens: enough to include more than the character that is incomplete or begins earlier."""
        n = WINDOW
        while n < len(ids) and len(self.tokenizer.decode(ids[-n:])) <= 2 * UNFINISHED:
            n *= 2
        last = list(ids[-n:])
        if n > WINDOW:
            special = {i for i in set(last) if self.is_special(i)}
            last = [i for i in last if i not in special]
        return last

    def push(self, ids: Iterable[int]) -> str:
        """The text that can be released after these further tokens."""
        text = ""
        for i in ids:
            self.ids.append(i)
            decoded = self.tokenizer.decode(self.ids)
            if decoded == self.decoded and self.is_special(i):
                self.ids.pop()
                continue
            self.decoded = decoded
            n_incomplete = min(UNFINISHED, len(decoded) - len(decoded.rstrip("\ufffd")))
            complete = decoded[: len(decoded) - n_incomplete]
            if new := self.unseen(complete):
                text += new
                self.shown = complete
                if len(self.ids) > 2 * WINDOW:
                    self.ids = self.tail(self.ids)
                    self.decoded = self.tokenizer.decode(self.ids)
                    self.shown = self.decoded[: len(self.decoded) - n_incomplete]
        return self.release(text)

    def close(self) -> str:
        """The text that was held back, when no token follows."""
        text = self.release(self.unseen(self.decoded))
        held, self.pending = self.pending, ""
        self.released.append(held)
        return text + held

    def is_special(self, token: int) -> bool:
        """Whether it is a special token, which does not show in the text."""
        return not self.tokenizer.decode([token]) and bool(self.tokenizer.decode([token], skip_special=False))

    def unseen(self, decoded: str) -> str:
        """What follows `shown`; or where the two differ, if the prompt ended within a character."""
        if decoded.startswith(self.shown):
            return decoded[len(self.shown) :]
        return decoded[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.shown, decoded))) :]

    def release(self, text: str) -> str:
        if self.stopped:
            return ""
        self.pending += text
        found = [at for word in self.stop if (at := self.pending.find(word)) >= 0]
        if found:
            ready, self.stopped, self.pending = self.pending[: min(found)], True, ""
        else:
            held = max((overlap(self.pending, word) for word in self.stop), default=0)
            ready = self.pending[: len(self.pending) - held]
            self.pending = self.pending[len(ready) :]
        self.released.append(ready)
        return ready


def overlap(text: str, word: str) -> int:
    """How many characters at the end of a text are the beginning of a word, but not all of it."""
    at = text.find(word[0], max(0, len(text) - len(word) + 1))
    while at >= 0 and not word.startswith(text[at:]):
        at = text.find(word[0], at + 1)
    return len(text) - at if at >= 0 else 0


@dataclass(eq=False)
class Answer:
    """What follows a prompt, while it grows."""

    number: int  # its place in the order in which the requests came
    request: Request
    stream: TextStream  # its text so far
    n_read: int = 0  # tokens that are in the text
    new_ids: Sequence[int] = ()  # the tokens that the last call of `new_text` read

    @property
    def finish(self) -> Optional[Finish]:
        """Why it ended; a stop string counts like a stop token. None while it goes on."""
        return "stop" if self.stream.stopped else self.request.finish

    @property
    def context_full(self) -> bool:
        """Whether it ended at the model's last position, before its own maximum."""
        return self.finish == "length" and len(self.request.ids) != self.request.max_new_tokens

    def new_text(self) -> str:
        """The text that was added since the last call."""
        self.new_ids = self.request.ids[self.n_read :]
        self.n_read += len(self.new_ids)
        text = self.stream.push(self.new_ids)
        if self.stream.stopped:
            self.request.cancel()
        return text + (self.stream.close() if self.finish else "")


def decode(
    engine: Union[Engine, Speculation], tokenizer: Tokenizer, requests: Iterable[Request], stop: Sequence[str] = ()
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
