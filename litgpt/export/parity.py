"""A GGUF file is opened again and compared with the model that it was made from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from litgpt.errors import UserError, require
from litgpt.export.architectures import Architecture
from litgpt.export.gguf_tensors import Tensor, source_rows
from litgpt.export.llama_cpp import LlamaCpp
from litgpt.families.weights import Weights
from litgpt.generate import reference_outputs
from litgpt.generate.engine import generate
from litgpt.methods.model_source import ModelSource
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.text.prompt_style import clock_at
from litgpt.text.prompts import PromptStyle
from litgpt.text.tokenizer import Tokenizer

N_PROMPT, N_ANSWER = 12, 12  # tokens at the end of a prompt, and of the answer, whose next tokens are compared
N_CONTEXT = 512
MARGIN = 1e-3  # two tokens whose log-probabilities are closer than this may change places


@dataclass
class Texts:
    """How llama.cpp tokenizes and renders the reference texts.

    Args:
        n: How many there are.
        other_ids: Those that it tokenizes in another way.
        other_prompts: Those from which its chat template makes another prompt.
        rendered: Whether there is a chat template.
        ids: Our tokens of each.
    """

    n: int = 0
    other_ids: list[str] = field(default_factory=list)
    other_prompts: list[str] = field(default_factory=list)
    rendered: bool = False
    ids: list[list[int]] = field(default_factory=list)


@dataclass
class Answers:
    """How llama.cpp continues the reference texts. Losses are those of our model's greedy answers in nats per token.

    Args:
        largest: The largest difference of a log-probability.
        n_same: At how many of `n` positions the most likely token is the same.
        loss: In our model.
        loss_there: In llama.cpp.
        loss_base: In our model without its adapter; None if it has none.
    """

    largest: float = 0.0
    n_same: int = 0
    n: int = 0
    loss: float = 0.0
    loss_there: float = 0.0
    loss_base: Optional[float] = None


def context_to_open(config: Config) -> int:
    """The length of the context that llama.cpp opens. A longer one than the original changes a rope of the type
    longrope."""
    original = config.rope_adjustments.get("original_max_position_embeddings") or N_CONTEXT
    return min(N_CONTEXT, int(original)) if config.rope_type == "longrope" else N_CONTEXT


@clock_at()
def compare_texts(there: LlamaCpp, tokenizer: Tokenizer, style: PromptStyle, rendered: bool) -> Texts:
    special, bos = not style.own_special_tokens, tokenizer.bos_token or ""
    found = Texts(rendered=rendered)
    for prompt in reference_outputs.PROMPTS:
        text = style.prompt([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(text, special)
        found.n += 1
        found.ids.append(ids)
        if rendered and there.render(prompt).removeprefix(bos) != text.removeprefix(bos):
            found.other_prompts.append(prompt)
        if there.encode(text, special) != ids or there.encode(prompt) != tokenizer.encode(prompt):
            found.other_ids.append(prompt)
    return found


@torch.no_grad()
def compare_answers(
    there: LlamaCpp, source: ModelSource, model: GPT, prompts: list[list[int]], longest: int, stops: Collection[int]
) -> Answers:
    """Compare the next token at the end of each prompt, and after each token of our greedy answer to it.

    Args:
        source: Where `model` comes from, with its adapter if it has one.
        longest: A prompt and its answer have at most this many tokens.
    """
    longest = min(longest, context_to_open(model.config)) - 1  # llama.cpp keeps a place for the answer
    found, ours_there, texts = Answers(), list[tuple[float, float]](), list[tuple[list[int], int]]()
    for prompt in (prompt for prompt in prompts if 0 < len(prompt) < longest):
        ids = [*prompt, *generate(model, prompt, min(N_ANSWER, longest - len(prompt)), stop_ids=stops)]
        rows = log_probabilities(model, ids)
        targets = [*ids[1:], int(rows[-1].argmax())]  # the last is the stop token, unless the answer goes on
        texts.append(([*ids, targets[-1]], len(prompt)))
        for i in range(max(0, len(prompt) - N_PROMPT), len(ids)):
            ours, theirs = rows[i], there.log_probabilities(ids[: i + 1], rows.size(1))
            found.largest = max(found.largest, (ours - theirs).abs().max().item())
            first, second = ours.topk(2).values.tolist()
            found.n_same += int(ours.argmax() == theirs.argmax() or first - second < MARGIN)
            found.n += 1
            if i >= len(prompt) - 1:
                ours_there.append((-ours[targets[i]].item(), -theirs[targets[i]].item()))
    if texts:
        found.loss, found.loss_there = (sum(column) / len(ours_there) for column in zip(*ours_there))
        if source.adapter is not None and source.config.padded_vocab_size == source.checkpoint.config.padded_vocab_size:
            with source.without_adapter(model):
                found.loss_base = loss_of_answers(model, texts)
    return found


def log_probabilities(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """(T, V), float32, on the CPU"""
    return model(torch.tensor([list(ids)], device=model.device))[0].float().log_softmax(-1).cpu()


def loss_of_answers(model: GPT, texts: Sequence[tuple[list[int], int]]) -> float:
    """Nats per token of answers. Each text comes with the length of its prompt."""
    losses = []
    for ids, n_prompt in texts:
        rows = log_probabilities(model, ids[:-1])
        losses += [-rows[i - 1, ids[i]].item() for i in range(n_prompt, len(ids))]
    return sum(losses) / len(losses)


def compare_tensors(path: Path, weights: Weights, tensors: list[Tensor], found: Architecture) -> tuple[float, str]:
    """The largest difference between a number in the file and ours, as a fraction of the largest of its tensor, and the
    name of the tensor. A few rows are in memory at a time. Types that `gguf` cannot read raise `UserError`."""
    gguf = require("gguf", "export")
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if there.keys() != {tensor.name for tensor in tensors}:
        raise UserError(f"{path} does not have the tensors that were written to it. The disk may be damaged.")
    worst, where = 0.0, ""
    for tensor in tensors:
        stored, at, largest, difference = there[tensor.name], 0, 0.0, 0.0
        rows = stored.data.reshape(-1, stored.data.shape[-1])
        for ours in source_rows(tensor, weights, found):
            numbers = gguf.quants.dequantize(np.array(rows[at : at + len(ours)]), stored.tensor_type)
            difference = max(difference, float(np.abs(numbers.reshape(ours.shape) - ours.numpy()).max()))
            largest, at = max(largest, float(ours.abs().max())), at + len(ours)
        if largest and difference / largest >= worst:
            worst, where = difference / largest, tensor.name
    return worst, where
