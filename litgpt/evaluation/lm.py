"""The interface between lm-eval and our models.

Texts are tokenized as in lm-eval's own class for `transformers`, so that scores are comparable.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Optional

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from litgpt.errors import UserError
from litgpt.evaluation.scoring import score
from litgpt.generate.answers import TextStream
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompts import template_variables
from litgpt.train.progress import SECONDS, duration

MAX_NEW_TOKENS = 256  # for tasks that set no limit, as in lm-eval
DEFAULT_BATCH = 32  # answers that are decoded at once
MARK = "\uffff "  # its blank shows whether a template strips the content
SUPPORTED = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks", "repetition_penalty"}

Pair = tuple[list[int], list[int]]


class LitGPT(LM):
    """A loaded model, as lm-eval uses it.

    Args:
        batch: How many different texts are read, or answers decoded, at once; None to choose by the device.
        chat: Whether prompts are rendered as conversations.
    """

    def __init__(
        self, loaded: InferenceModel, batch: Optional[int] = None, seed: int = 1234, chat: bool = False
    ) -> None:
        super().__init__()
        self.loaded, self.batch, self.seed, self.chat = loaded, batch, seed, chat
        self._device = loaded.device
        self.notes: set[str] = set()

    @property
    def max_length(self) -> int:
        return self.loaded.model.config.block_size

    @property
    def prefix_token_id(self) -> int:
        """The token before the first token of a text: BOS, else EOS, if the tokenizer has them."""
        tokenizer = self.loaded.tokenizer
        named = [tokenizer.token_id(token, None) for token in (tokenizer.bos_token, tokenizer.eos_token) if token]
        return next((i for i in (*named, tokenizer.bos_id, tokenizer.eos_id) if i is not None), 0)

    @property
    def tokenizer(self) -> SimpleNamespace:
        """What lm-eval records of a tokenizer. Nothing is padded; the padding token is the one lm-eval would use."""
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
        """Ids of texts. `special` adds the tokenizer's special tokens; as in lm-eval, not if a text begins with BOS.

        `rendered` texts are prompts. If their style is not the folder's own template, which lm-eval would use, they are
        tokenized as in training: without special tokens beyond those in the text.
        """
        style = self.loaded.style
        as_trained = rendered and self.chat and style.own_special_tokens and style.name != "chat"
        start = self.loaded.tokenizer.decode([self.prefix_token_id], skip_special=False)
        unique = list(dict.fromkeys(texts))
        add_special = [special and not as_trained and not text.startswith(start) for text in unique]
        encoded = self.loaded.tokenizer.encode_batch(unique, add_special)
        ids = {text: list(e.ids) for text, e in zip(unique, encoded)}
        return [ids[text] for text in texts]

    def pairs(self, requests: Sequence[Instance]) -> list[Pair]:
        """Contexts and continuations as ids. Blanks between them belong to the continuation."""
        prefix, args = self.prefix_token_id, [request.args for request in requests]
        contexts = iter(self.encode([context.rstrip() for context, _ in args if context], rendered=True))
        complete = iter(self.encode([context + after for context, after in args if context], rendered=True))
        alone = iter(self.encode([after for context, after in args if not context], special=False))
        found: list[Pair] = []
        for context, _ in args:
            if context:
                before = next(contexts)
                found.append((before or [prefix], next(complete)[len(before) :]))
            else:
                ids = next(alone)
                found.append((ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids))
        self.check_pairs(found)
        return found

    def check_pairs(self, pairs: Sequence[Pair]) -> None:
        for context, continuation in pairs:
            self.loaded.tokenizer.check([*context, *continuation])

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding would produce it."""
        pairs = self.pairs(requests)
        long = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
        self.note_truncated([self.max_length] * long, len(pairs))
        return score(self.loaded.model, pairs, self.batch, ProgressLine("log-likelihoods: tokens").show)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-probability of each text, in windows of the model's context."""
        numbers, windows = list[int](), list[Pair]()
        for i, ids in enumerate(self.encode([request.args[0] for request in requests])):
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                numbers.append(i)
                windows.append(make_disjoint_window(window))
        self.check_pairs(windows)
        sums = [0.0] * len(requests)
        scores = score(self.loaded.model, windows, self.batch, ProgressLine("texts: tokens").show)
        for i, (logprob, _) in zip(numbers, scores):
            sums[i] += logprob
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each prompt, up to one of the task's stop strings."""
        prompts = self.encode([request.args[0] for request in requests], rendered=True)
        texts = [self.request(i, ids, r.args[1]) for i, (ids, r) in enumerate(zip(prompts, requests))]
        kept = [len(text.prompt) for text, ids in zip(texts, prompts) if len(text.prompt) < len(ids)]
        self.note_truncated(kept, len(texts))
        rows = min(self.batch or DEFAULT_BATCH, max(1, len(texts)))
        engine = Engine(self.loaded.model, rows)
        for text in sorted(texts, key=lambda text: (-len(text.prompt).bit_length(), list(text.prompt))):
            engine.submit(text)  # the longest first, and those with a shared prefix together
        progress = ProgressLine("answers")
        while engine.busy:
            for text in engine.step():
                text.tag.update(text)
            progress.show(sum(text.finish is not None for text in texts), len(texts))
        decode = self.loaded.tokenizer.decode
        return [postprocess_generated_text(decode(text.ids), text.tag.until, None) for text in texts]

    def request(self, number: int, prompt: list[int], options: dict[str, Any]) -> Request:
        """A prompt as a request to the engine, truncated on the left to leave room for the answer."""
        tokenizer = self.loaded.tokenizer
        try:
            wanted = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
            until = handle_stop_sequences(wanted["until"], eos=tokenizer.eos_token)
        except ValueError as e:
            raise UserError(f"A task's generation_kwargs cannot be used: {e}.") from e
        if ignored := sorted(set(wanted) - SUPPORTED):
            self.note(f"ignoring unsupported generation options: {', '.join(ignored)}")
        new = max(1, min(wanted["max_gen_toks"], self.max_length // 2))
        if new < wanted["max_gen_toks"]:
            self.note(f"answers are limited to {new} tokens, half of the model's context")
        sampling = Sampling(temperature=0.0)
        if wanted.get("do_sample"):
            sampling = Sampling(
                temperature=float(options.get("temperature", 1.0)),
                top_k=wanted.get("top_k", 50) or None,
                top_p=float(wanted.get("top_p", 1.0)),
                repetition_penalty=float(wanted.get("repetition_penalty", 1.0)),
            )
        stops = self.loaded.stop_ids if self.chat else tokenizer.stop_ids
        kept = prompt[-(self.max_length - new) :] or [self.prefix_token_id]
        tokenizer.check(kept)
        watcher = StopWatcher(until, TextStream(tokenizer, [], until))
        return Request(kept, new, sampling=sampling, stop_ids=stops, seed=self.seed + number, tag=watcher)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.add(text)
            print(f"litgpt: {text}.", file=sys.stderr)

    def note_truncated(self, kept: Sequence[int], total: int) -> None:
        """Report truncated prompts, given the number of tokens kept of each."""
        if kept:
            length = f"{min(kept)}" if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
            self.note(
                f"{len(kept):,} of {total:,} prompts were truncated to their last {length} tokens, because the model's "
                f"context has {self.max_length}"
            )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, in the style that the model was trained with or by its template. As in lm-eval, the
        system message is dropped if the style does not support it."""
        try:
            return self.rendered(chat_history, add_generation_prompt)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            self.note("the chat template refuses system messages; they are dropped")
            return self.rendered(others, add_generation_prompt)

    def rendered(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation as text. Without a generation prompt, it ends after the last message's content, unclosed."""
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
        """What lm-eval records of a model."""
        model = self.loaded.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(model.dtype),
            "model_revision": "main",
            "model_sha": "",
        }


@dataclass
class StopWatcher:
    """Cancels a sequence when its text contains a stop string."""

    until: list[str]
    stream: TextStream
    seen: int = 0

    def update(self, text: Request) -> None:
        self.stream.push(text.ids[self.seen :])
        self.seen = len(text.ids)
        if self.stream.stopped:
            text.cancel()


class ProgressLine:
    """A line about the progress and the time left, printed every few seconds, or updated in place in a terminal."""

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
