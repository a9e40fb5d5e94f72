"""Our model as lm-eval asks it: text goes in, numbers and text come out.

Tokens are made as by lm-eval's own class for `transformers`, so that scores can be compared.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any, Optional

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from litgpt.errors import UserError
from litgpt.evaluation.scoring import score
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.generate.text import TextStream
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompts import template_variables
from litgpt.train.progress import SECONDS, duration

MAX_NEW = 256  # tokens of an answer where a task does not say how many, as in lm-eval
ROWS = 32  # answers that are decoded at once by default
MARK = "\uffff "  # the blank shows whether a template strips what it stands behind
KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks", "repetition_penalty"}

Pair = tuple[list[int], list[int]]


def remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Note an error of this method, so that it can be told from what lm-eval says about its tasks."""

    @wraps(method)
    def call(self: "LitGPT", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as e:
            self.failed = e
            raise

    return call


class LitGPT(LM):
    """A loaded folder.

    Args:
        batch: Different texts that are read, or answers that are decoded, at once; None for as many as make good use of
            the device.
        seed: Of answers that are drawn.
        chat: Whether prompts are rendered as conversations.
    """

    def __init__(
        self, loaded: InferenceModel, batch: Optional[int] = None, seed: int = 1234, chat: bool = False
    ) -> None:
        super().__init__()
        self.loaded, self.batch, self.seed, self.chat = loaded, batch, seed, chat
        self._device = loaded.device
        self.said: set[str] = set()
        self.failed: Optional[Exception] = None

    @property
    def max_length(self) -> int:
        return self.loaded.model.config.block_size

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text follows: BOS, else EOS, as far as the tokenizer has them."""
        tokenizer = self.loaded.tokenizer
        named = [tokenizer.token_id(token, None) for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
        found = next((i for i in (*named, tokenizer.bos_id, tokenizer.eos_id) if i is not None), 0)
        return found

    @property
    def tokenizer(self) -> SimpleNamespace:
        """What lm-eval notes of a tokenizer. Nothing is padded here; it is the padding token that lm-eval takes."""
        ours = self.loaded.tokenizer
        named = template_variables(ours.folder)
        pad = named.get("pad_token") or named.get("unk_token") or ours.eos_token
        return SimpleNamespace(
            pad_token=pad,
            pad_token_id=ours.token_id(pad, None),
            eos_token=ours.eos_token,
            eos_token_id=ours.eos_id,
            bos_token=ours.bos_token,
            bos_token_id=ours.bos_id,
        )

    @property
    def eot_token_id(self) -> Optional[int]:
        return self.loaded.tokenizer.eos_id

    def encode(self, texts: Sequence[str], special: bool = True, rendered: bool = False) -> list[list[int]]:
        """Ids of texts.

        Args:
            special: Whether special tokens are added as the tokenizer does it; as in lm-eval, never to a text that
                begins with BOS.
            rendered: Whether the texts are prompts. Those of a style that is not in the folder's own template, which
                lm-eval does not know, have the tokens that they had in training: none but what is written.
        """
        style = self.loaded.style
        as_trained = rendered and self.chat and style.own_special_tokens and style.name != "chat"
        start = self.loaded.tokenizer.decode([self.prefix_token_id], skip_special=False)
        different = list(dict.fromkeys(texts))
        wanted = [special and not as_trained and not text.startswith(start) for text in different]
        encoded = self.loaded.tokenizer.encode_batch(different, wanted)
        ids = {text: list(e.ids) for text, e in zip(different, encoded)}
        return [ids[text] for text in texts]

    def pairs(self, requests: Sequence[Instance]) -> list[Pair]:
        """Contexts and continuations as ids; a blank between them belongs to the continuation."""
        prefix = self.prefix_token_id
        texts = []
        for request in requests:
            context, continuation = request.args
            bare = context.rstrip()
            texts.append((bare, context[len(bare) :] + continuation, context == ""))
        contexts = iter(self.encode([bare for bare, _, empty in texts if not empty], rendered=True))
        wholes = iter(self.encode([bare + after for bare, after, empty in texts if not empty], rendered=True))
        alone = iter(self.encode([after for _, after, empty in texts if empty], special=False))
        found: list[Pair] = []
        for _, _, empty in texts:
            if empty:
                ids = next(alone)
                found.append((ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids))
            else:
                before = next(contexts)
                found.append((before or [prefix], next(wholes)[len(before) :]))
        self.check(found)
        return found

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raise `UserError` for a token that the model has no embedding for."""
        for context, continuation in pairs:
            self.loaded.tokenizer.check([*context, *continuation])

    @remembered
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each pair the log-probability of the continuation, and whether it is what the model would say."""
        pairs = self.pairs(requests)
        long = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
        self.say_truncated([self.max_length] * long, len(pairs))
        return score(self.loaded.model, pairs, self.batch, Left("log-likelihoods: tokens").show)

    @remembered
    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """For each text its log-probability, in windows of what the model reads."""
        numbers, windows = list[int](), list[Pair]()
        for i, ids in enumerate(self.encode([request.args[0] for request in requests])):
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                numbers.append(i)
                windows.append(make_disjoint_window(window))
        self.check(windows)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(numbers, score(self.loaded.model, windows, self.batch, Left("texts: tokens").show)):
            sums[i] += logprob
        return sums

    @remembered
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each prompt what the model answers, up to one of the task's stop strings."""
        prompts = self.encode([request.args[0] for request in requests], rendered=True)
        texts = [self.question(i, ids, r.args[1]) for i, (ids, r) in enumerate(zip(prompts, requests))]
        kept = [len(text.prompt) for text, ids in zip(texts, prompts) if len(text.prompt) < len(ids)]
        self.say_truncated(kept, len(texts))
        rows = min(self.batch or ROWS, max(1, len(texts)))
        engine = Engine(self.loaded.model, rows)
        for text in sorted(texts, key=lambda text: (-len(text.prompt).bit_length(), list(text.prompt))):
            engine.submit(text)  # the longest first, and what begins alike together
        left = Left("answers")
        while engine.busy:
            for text in engine.step():
                text.tag.take(text)
            left.show(sum(text.finish is not None for text in texts), len(texts))
        decode = self.loaded.tokenizer.decode
        return [postprocess_generated_text(decode(text.ids), text.tag.until, None) for text in texts]

    def question(self, number: int, prompt: list[int], options: dict[str, Any]) -> Request:
        """A prompt as a request to the engine; it loses its beginning where there would be no room for the answer."""
        tokenizer = self.loaded.tokenizer
        try:
            wanted = normalize_gen_kwargs(options, MAX_NEW)
            until = handle_stop_sequences(wanted["until"], eos=tokenizer.eos_token)
        except ValueError as e:
            raise UserError(f"A task's generation_kwargs cannot be used: {e}.") from e
        self.say_once(
            f"generation options without effect: {', '.join(sorted(set(wanted) - KNOWN))}", set(wanted) - KNOWN
        )
        new = max(1, min(wanted["max_gen_toks"], self.max_length // 2))
        self.say_once(
            f"answers are limited to {new} tokens, half of what the model reads", new < wanted["max_gen_toks"]
        )
        sampling = Sampling(temperature=0.0)
        if wanted.get("do_sample"):
            top_k = wanted.get("top_k", 50) or None
            penalty = float(wanted.get("repetition_penalty", 1.0))
            temperature, top_p = float(options.get("temperature", 1.0)), float(wanted.get("top_p", 1.0))
            sampling = Sampling(temperature, top_k, top_p, repetition_penalty=penalty)
        stops = self.loaded.stop_ids if self.chat else tokenizer.stop_ids
        kept = prompt[-(self.max_length - new) :] or [self.prefix_token_id]
        tokenizer.check(kept)
        answer = Answer(until, TextStream(tokenizer, [], until))
        return Request(kept, new, sampling, stops, self.seed + number, tag=answer)

    def say_once(self, words: str, wanted: Any) -> None:
        if wanted and words not in self.said:
            self.said.add(words)
            print(f"litgpt: {words}.", file=sys.stderr)

    def say_truncated(self, kept: Sequence[int], total: int) -> None:
        """Say once how many prompts lost their beginning, given the tokens that were kept of each."""
        lengths = sorted(set(kept))
        to = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}" if lengths else ""
        self.say_once(
            f"{len(kept):,} of {total:,} prompts are too long and were truncated to their last {to} tokens "
            f"(the model reads {self.max_length})",
            kept,
        )

    @remembered
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the style that the model was trained with or its template; as in lm-eval without
        the system message, if it is refused with it."""
        try:
            return self.rendered(chat_history, add_generation_prompt)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            self.say_once("the chat template refuses system messages, so they are left out", True)
            return self.rendered(others, add_generation_prompt)

    def rendered(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as text; without a generation prompt, up to the end of its last message, which goes on."""
        style, last = self.loaded.style, chat[-1]
        if add_generation_prompt:
            return style.prompt(chat)
        if not isinstance(style, ChatTemplate):
            return style.prompt(chat[:-1]) + last["content"]
        text = style.render([*chat[:-1], {**last, "content": last["content"] + MARK}], False)
        before, _, after = text.rpartition(MARK.strip())
        return before if after.startswith(" ") else before.rstrip()

    def chat_template(self, chat_template: Any = False) -> str:
        return getattr(self.loaded.style, "template", self.loaded.style.name) if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.source.folder).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes of a model."""
        model = self.loaded.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(model.dtype),
            "model_revision": "main",
            "model_sha": "",
        }


@dataclass
class Answer:
    """Follows a text until it says a stop string."""

    until: list[str]
    stream: TextStream
    seen: int = 0

    def take(self, text: Request) -> None:
        self.stream.push(text.ids[self.seen :])
        self.seen = len(text.ids)
        if self.stream.stopped:
            text.cancel()


class Left:
    """Says every few seconds how far something is and how long it will still take; at once in a terminal."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.last, self.shown = what, time.perf_counter(), 0.0, False
        self.terminal = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        now = time.perf_counter()
        ends = done == total and self.shown
        if now - max(self.last, self.began) < (0.2 if self.terminal else SECONDS) and not ends:
            return
        self.last, self.shown = now, True
        left = duration((now - self.began) / max(1, done) * (total - done))
        line = f"{self.what} {done:,} of {total:,} | {left} left"
        if self.terminal:
            print(f"\r{line}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
