"""A conversation with a model: each answer follows from one rendering of everything before it."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.generate.answers import decode
from litgpt.generate.engine import Engine, Finish, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling

NO_LIMIT = ("null", "none", "off")  # values of `/set` for no limit


class Conversation:
    """Messages, and an engine that still has most of them in its cache when the next one comes."""

    def __init__(
        self,
        loaded: InferenceModel,
        sampling: Sampling,
        max_new_tokens: Optional[int] = None,
        stop: Sequence[str] = (),
        seed: int = 1234,
        system: Optional[str] = None,
    ) -> None:
        self.loaded, self.sampling, self.max_new_tokens = loaded, sampling, max_new_tokens
        self.stop, self.seed, self.retries = stop, seed, 0
        self.messages: list[dict[str, Any]] = []  # so far, the system message first if there is one
        # whether the prompt style is for a single prompt, so that the model sees no earlier messages
        self.single_turn = loaded.style.single_turn
        self.unanswered: Optional[str] = None  # the last prompt, if its answer was stopped before any text
        self.finish: Optional[Finish] = None  # why the last answer ended
        self.context_full, self.n_new = False, 0  # whether that was because of the context; tokens of the answer
        self.engine = Engine(loaded.model, rows=1)
        self.set_system(system)

    @property
    def system(self) -> list[dict[str, Any]]:
        """The system message, or nothing."""
        return [m for m in self.messages[:1] if m["role"] == "system"]

    def set_system(self, text: Optional[str]) -> None:
        """Replace the system message, or remove it. Raises `UserError` if the prompt style has no place for one."""
        system = [{"role": "system", "content": text}] if text else []
        if system:
            self.loaded.render([*system, {"role": "user", "content": "Hello"}])
        self.messages = system + self.messages[len(self.system) :]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages, self.unanswered = self.system, None

    def retry(self) -> Iterator[str]:
        """Another answer to the last prompt, drawn with other random numbers, in place of the last one. Raises
        `UserError` if there is no prompt, or as `ask`; the conversation then stays as it was."""
        before, prompt = self.messages, self.unanswered
        if prompt is None:
            if len(self.messages) < 2 or self.messages[-2]["role"] != "user":
                raise UserError("There is no prompt to answer again.")
            prompt, self.messages = self.messages[-2]["content"], self.messages[:-2]
        self.retries += 1
        try:
            return self.ask(prompt)
        except UserError:
            self.messages = before
            raise

    def settings(self) -> dict[str, Any]:
        """The system message, and what `set` changes."""
        system = {"system": self.system[0]["content"]} if self.system else {}
        return system | dataclasses.asdict(self.sampling) | {"max_new_tokens": self.max_new_tokens}

    def set(self, name: str, text: str) -> str:
        """Change a setting of sampling, or the length of answers. Returns a sentence about it. Raises `UserError` for a
        name or a value that is not possible."""
        known, name = [name for name in self.settings() if name != "system"], name.lower()
        if name not in known or not text:
            raise UserError(f"Usage: /set NAME VALUE, with one of {', '.join(known)}.")
        whole = name in ("top_k", "max_new_tokens")
        if whole and text.lower() in NO_LIMIT:
            value, text = None, "null"
        elif re.fullmatch(r"[+-]?\d{1,9}" if whole else r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.I):
            value = int(text) if whole else float(text)
        else:
            raise UserError(
                f"/set {name} {text}: expected {'a whole number, or null' if whole else 'a number such as 0.2'}."
            )
        if name == "max_new_tokens":
            if value is not None and value < 1:
                raise UserError(f"/set {name} {text}: expected a number above 0.")
            self.max_new_tokens = value  # type: ignore[assignment]
        else:
            try:
                self.sampling = dataclasses.replace(self.sampling, **{name: value})  # type: ignore[arg-type]
            except UserError as e:
                raise UserError(str(e).replace("--", "/set ", 1)) from e
        return f"Set {name} to {text}."

    def ask(self, prompt: str) -> Iterator[str]:
        """The answer to a prompt, as text that comes while it grows.

        Prompt and answer join the conversation when the iterator ends or is closed; then with the text so far. Raises
        `UserError`, at once, if the conversation with this prompt does not fit into the context. It stays as it was.
        """
        messages = [*(self.system if self.single_turn else self.messages), {"role": "user", "content": prompt}]
        _, ids = self.loaded.render(messages)
        self.check_length(ids, prompt)
        turn = sum(m["role"] == "user" for m in self.messages)
        seed = self.seed + turn + 1000 * self.retries
        request = Request(ids, self.max_new_tokens, self.sampling, self.loaded.stop_ids, seed)
        return self.answer(request, prompt)

    def check_length(self, ids: Sequence[int], prompt: str) -> None:
        limit = self.loaded.model.config.block_size
        if len(ids) < limit:
            return
        prompt_ids = self.loaded.render([*self.system, {"role": "user", "content": prompt}])[1]
        if len(prompt_ids) >= limit:
            raise UserError(
                f"The prompt has {len(prompt_ids)} tokens; the model reads at most {limit}. It was not sent."
            )
        raise UserError(
            f"The context is full: with this prompt, the conversation has {len(ids)} tokens; the model reads at most "
            f"{limit}. It was not sent. /clear starts a new conversation."
        )

    def answer(self, request: Request, prompt: str) -> Iterator[str]:
        texts, answer, complete = list[str](), None, False
        try:
            for answer, text in decode(self.engine, self.loaded.tokenizer, [request], self.stop):  # noqa: B007
                texts.append(text)
                yield text
            complete = True
        finally:
            if not complete:
                self.engine.clear()
            self.n_new = len(request.ids)
            self.finish = "cancelled" if answer is None else answer.finish or "cancelled"
            self.context_full = answer is not None and answer.context_full
            said = "".join(texts)
            self.unanswered = prompt
            if said or self.finish != "cancelled":
                self.unanswered = None
                self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
