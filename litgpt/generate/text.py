"""The text of an answer while it grows."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from litgpt.text.tokenizer import Tokenizer

WINDOW = 8  # tokens that are decoded again with the next one
UNFINISHED = 3  # maximum bytes of an incomplete character; each may show as a replacement character


class TextStream:
    """Turns the tokens of an answer into text while they come.

    An incomplete character is held back, and so is what may become a stop string. A token takes the same time wherever
    it is in an answer, and whatever the length of the prompt.

    Args:
        prompt: The ids before the answer. How the first token is written may depend on the last of them.
        stop: Strings that end the answer. They do not belong to it.

    Attributes:
        stopped: Whether a stop string came. No text follows after that.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = self.tail(prompt)  # the context for the next token
        self.decoded = tokenizer.decode(self.ids)
        self.shown = self.decoded  # the part of `decoded` that was released, or belongs to the prompt
        self.stop = [word for word in stop if word]
        self.pending, self.released, self.stopped = "", list[str](), False

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
