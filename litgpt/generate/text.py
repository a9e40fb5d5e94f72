"""The text of an answer while it grows."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from litgpt.text.tokenizer import Tokenizer

WINDOW = 8  # tokens that are decoded again with the next one
UNFINISHED = 3  # bytes of a character that is not whole, at most; each may show as a replacement character


class TextStream:
    """Turns the tokens of an answer into text, piece by piece.

    A character is held back until it is whole, and what may become a stop string until it is clear. A token takes the
    same time wherever it stands in an answer, and whatever the length of the prompt.

    Args:
        prompt: The ids before the answer; how the first token is written may depend on the last of them.
        stop: Strings that end the answer; they are left out.

    Attributes:
        stopped: Whether a stop string came; nothing is given out after that.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = self.last(prompt)  # the context for the next token
        self.after = tokenizer.decode(self.ids)
        self.before = self.after  # what of this text was given out, or belongs to the prompt
        self.stop = [word for word in stop if word]
        self.pending, self.given, self.stopped = "", list[str](), False

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self.given)

    def last(self, ids: Sequence[int]) -> list[int]:
        """The last of some tokens, enough of them to go beyond a character that is not whole, or was cut here."""
        n = WINDOW
        while n < len(ids) and len(self.tokenizer.decode(ids[-n:])) <= 2 * UNFINISHED:
            n *= 2
        found = list(ids[-n:])
        if n > WINDOW:
            hidden = {i for i in set(found) if self.hidden(i)}
            found = [i for i in found if i not in hidden]
        return found

    def push(self, ids: Iterable[int]) -> str:
        """The text that can be given out after these further tokens."""
        pieces = ""
        for i in ids:
            self.ids.append(i)
            after = self.tokenizer.decode(self.ids)
            if after == self.after and self.hidden(i):
                self.ids.pop()
                continue
            self.after = after
            ready = after[: len(after) - min(UNFINISHED, len(after) - len(after.rstrip("\ufffd")))]
            if piece := self.added(ready):
                pieces += piece
                self.before = ready
                if len(self.ids) > 2 * WINDOW:
                    self.ids = self.last(self.ids)
                    self.after = self.tokenizer.decode(self.ids)
                    self.before = self.after[: len(self.after) - (len(after) - len(ready))]
        return self.release(pieces)

    def close(self) -> str:
        """The text that was held back, when no token follows."""
        rest = self.release(self.added(self.after))
        held, self.pending = self.pending, ""
        self.given.append(held)
        return rest + held

    def hidden(self, token: int) -> bool:
        """Whether it is a special token, which no text shows."""
        return not self.tokenizer.decode([token]) and bool(self.tokenizer.decode([token], skip_special=False))

    def added(self, after: str) -> str:
        """What follows the part that is as before; where the prompt ended within a character, that is not."""
        if after.startswith(self.before):
            return after[len(self.before) :]
        return after[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.before, after))) :]

    def release(self, piece: str) -> str:
        if self.stopped:
            return ""
        self.pending += piece
        found = [at for word in self.stop if (at := self.pending.find(word)) >= 0]
        if found:
            ready, self.stopped, self.pending = self.pending[: min(found)], True, ""
        else:
            held = max((overlap(self.pending, word) for word in self.stop), default=0)
            ready = self.pending[: len(self.pending) - held]
            self.pending = self.pending[len(ready) :]
        self.given.append(ready)
        return ready


def overlap(text: str, word: str) -> int:
    """How many characters at the end of a text are the beginning of a word, less than all of it."""
    at = text.find(word[0], max(0, len(text) - len(word) + 1))
    while at >= 0 and not word.startswith(text[at:]):
        at = text.find(word[0], at + 1)
    return len(text) - at if at >= 0 else 0
