"""The text of an answer while it grows."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from litgpt.tokenizer import Tokenizer


class TextStream:
    """Turns the tokens of an answer into text, piece by piece.

    A character is held back until it is whole, and what may become a stop string until it is clear.

    Args:
        prompt: The ids before the answer; how the first token is written may depend on them.
        stop: Strings that end the answer; they are left out.

    Attributes:
        text: What was given out so far.
        stopped: Whether a stop string came; nothing is given out after that.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt)  # all of it at first: a part may begin within a character
        self.start, self.shown = 0, len(self.ids)  # ids[start:shown] were given out; they are the context for the next
        self.before = tokenizer.decode(self.ids)  # their text
        self.stop = [word for word in stop if word]
        self.pending, self.text, self.stopped = "", "", False

    def push(self, ids: Iterable[int]) -> str:
        """The text that can be given out after these further tokens."""
        pieces = ""
        for i in ids:
            self.ids.append(i)
            after = self.tokenizer.decode(self.ids[self.start :])
            if not after.endswith("\ufffd") and (piece := self.added(after)):
                pieces += piece
                self.start, self.shown = self.shown, len(self.ids)
                self.before = self.tokenizer.decode(self.ids[self.start : self.shown])
        return self.release(pieces)

    def close(self) -> str:
        """The text that was held back, when no token follows."""
        rest = self.release(self.added(self.tokenizer.decode(self.ids[self.start :])))
        held, self.pending = self.pending, ""
        self.text += held
        return rest + held

    def added(self, after: str) -> str:
        """What follows the part that is as before; where the prompt ended within a character, that is not."""
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
        self.text += ready
        return ready


def overlap(text: str, word: str) -> int:
    """How many characters at the end of a text are the beginning of a word, less than all of it."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
