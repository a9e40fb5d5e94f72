"""The bodies of OpenAI's answers, whole and in parts (https://platform.openai.com/docs/api-reference)."""

import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Optional

from litgpt.serve.worker import Piece, Token
from litgpt.text.tokenizer import Tokenizer

Fields = dict[str, Any]


class ResponseFormat:
    """One answer of OpenAI's interface.

    Args:
        kind: The path below `/v1`: `chat/completions` or `completions`.
        model: The name that was asked for.
        tokenizer: Of the model.
        logprobs: Whether log-probabilities are wanted.
    """

    def __init__(self, kind: str, model: str, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.chat = kind == "chat/completions"
        self.model, self.tokenizer, self.logprobs = model, tokenizer, logprobs
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def frame(self, choices: Sequence[Fields], part: bool, **more: Any) -> Fields:
        kind = "chat.completion" if self.chat else "text_completion"
        kind += ".chunk" if self.chat and part else ""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def whole(self, answers: Sequence[Sequence[Piece]], prompt: int, new: int) -> Fields:
        """All answers, each from its pieces."""
        choices = []
        for i, pieces in enumerate(answers):
            text, tokens = "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens]
            if self.chat:
                said: Fields = {"message": {"role": "assistant", "content": text, "refusal": None}}
            else:
                said = {"text": text}
            finish = pieces[-1].finish if pieces else None
            choices.append({"index": i, **said, "logprobs": self.about(tokens), "finish_reason": finish})
        return self.frame(choices, part=False, usage=usage(prompt, new))

    def opening(self, n: int) -> list[Fields]:
        """What stands before the first token of each answer."""
        if not self.chat:
            return []
        said = {"role": "assistant", "content": "", "refusal": None}
        return [
            self.frame([{"index": i, "delta": said, "logprobs": None, "finish_reason": None}], part=True)
            for i in range(n)
        ]

    def parts(self, piece: Piece) -> list[Fields]:
        """A piece as chunks: its text, and a chunk of its own for the end."""
        made = []
        if piece.text or (self.logprobs and piece.tokens):
            said = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
            made.append({"index": piece.index, **said, "logprobs": self.about(piece.tokens), "finish_reason": None})
        if piece.finish:
            said = {"delta": dict[str, str]()} if self.chat else {"text": ""}
            made.append({"index": piece.index, **said, "logprobs": None, "finish_reason": piece.finish})
        return [self.frame([choice], part=True) for choice in made]

    def about(self, tokens: Sequence[Token]) -> Optional[Fields]:
        """The log-probabilities of tokens; None where they are not wanted."""
        if not self.logprobs:
            return None
        if self.chat:
            content = [
                {**self.entry(t.id, t.logprob), "top_logprobs": [self.entry(*pair) for pair in t.top]} for t in tokens
            ]
            return {"content": content, "refusal": None}
        words = [self.word(t.id) for t in tokens]
        return {
            "tokens": words,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self.word(i): logprob for i, logprob in t.top} for t in tokens],
            "text_offset": list(accumulate(map(len, words[:-1]), initial=0)) if words else [],
        }

    def entry(self, token: int, logprob: Optional[float]) -> Fields:
        word = self.word(token)
        whole = "\ufffd" not in word  # else a part of a character
        return {"token": word, "logprob": logprob, "bytes": list(word.encode()) if whole else None}

    def word(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


def usage(prompt: int, new: int) -> Fields:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
