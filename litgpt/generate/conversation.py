"""A conversation with a model: each answer is what one rendering of everything before it gives."""

from collections.abc import Iterator, Sequence
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.generate.answers import Answer, decode
from litgpt.generate.engine import Engine, Finish, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.text.styles import NamedStyle


class Conversation:
    """Messages, and an engine that still has most of them in its cache when the next one comes.

    Args:
        sampling: How tokens are drawn.
        max_new_tokens: The length of an answer, at most.
        stop: Strings that end an answer.
        seed: The same seed draws the same answers to the same messages.

    Attributes:
        messages: What was said, the system message first if there is one.
        alone: Whether the prompt style is for one prompt, so that the model sees none of what came before.
        finish: Why the last answer ended.
        full: Whether that was because the context is full.
        n_new: Tokens of the last answer.
    """

    def __init__(
        self,
        loaded: InferenceModel,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        seed: int = 1234,
        system: Optional[str] = None,
    ) -> None:
        self.loaded, self.sampling, self.max_new_tokens = loaded, sampling, max_new_tokens
        self.stop, self.seed = stop, seed
        self.messages: list[dict[str, Any]] = []
        self.alone = isinstance(loaded.style, NamedStyle) and loaded.style.close is None
        self.finish: Optional[Finish] = None
        self.full, self.n_new = False, 0
        self.engine = Engine(loaded.model, rows=1)
        self.set_system(system)

    @property
    def system(self) -> list[dict[str, Any]]:
        """The system message, or nothing."""
        return [m for m in self.messages[:1] if m["role"] == "system"]

    def set_system(self, text: Optional[str]) -> None:
        """Put another system message before the conversation, or none.

        Raises:
            UserError: the prompt style shows none.
        """
        system = [{"role": "system", "content": text}] if text else []
        if system:
            self.loaded.render([*system, {"role": "user", "content": "Hello"}])
        self.messages = system + self.messages[len(self.system) :]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.system

    def ask(self, text: str) -> Iterator[str]:
        """Say something; the answer, piece by piece.

        Prompt and answer join the conversation when the iterator ends, or is closed: then with what was said so far.

        Raises:
            UserError: the conversation does not fit into the context with this prompt; it stays as it was. At once.
        """
        said = [*(self.system if self.alone else self.messages), {"role": "user", "content": text}]
        _, ids = self.loaded.render(said)
        self.check(ids, text)
        turn = sum(m["role"] == "user" for m in self.messages)
        new = Request(ids, self.max_new_tokens, self.sampling, self.loaded.stop_ids, self.seed + turn)
        return self.answer(new, text)

    def check(self, ids: Sequence[int], text: str) -> None:
        most = self.loaded.model.config.block_size
        if len(ids) < most:
            return
        alone = self.loaded.render([*self.system, {"role": "user", "content": text}])[1]
        if len(alone) >= most:
            raise UserError(f"The prompt has {len(alone)} tokens; the model reads at most {most}. It was not sent.")
        raise UserError(
            f"The context is full: the conversation has {len(ids)} tokens with this prompt, the model reads at most "
            f"{most}. It was not sent; /reset begins a new conversation."
        )

    def answer(self, new: Request, text: str) -> Iterator[str]:
        pieces, last, whole = list[str](), None, False
        self.finish, self.full, self.n_new = None, False, 0
        try:
            for last, piece in decode(self.engine, self.loaded.tokenizer, [new], self.stop):  # noqa: B007
                pieces.append(piece)
                yield piece
            whole = True
        finally:
            if not whole:
                self.engine.clear()
            self.end(last, text, "".join(pieces))

    def end(self, answer: Optional[Answer], text: str, said: str) -> None:
        self.finish, self.n_new = "cancelled", 0
        if answer is not None:
            self.finish, self.n_new = answer.finish or "cancelled", len(answer.text.ids)
            self.full = self.finish == "length" and self.n_new < self.max_new_tokens
        if said or self.finish != "cancelled":
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
