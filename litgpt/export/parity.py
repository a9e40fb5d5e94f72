"""A GGUF file is opened again and compared with the model that it was made from."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from litgpt.errors import UserError, require
from litgpt.export.architectures import Architecture
from litgpt.export.gguf_tensors import Tensor, source_rows
from litgpt.export.llama_cpp import LlamaCpp
from litgpt.families.weights import Weights
from litgpt.generate import reference_outputs
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.text.prompt_style import clock_at
from litgpt.text.prompts import PromptStyle
from litgpt.text.tokenizer import Tokenizer

N_TOKENS = 24  # of each text, whose next tokens are compared
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
    """How llama.cpp continues the reference texts.

    Args:
        largest: The largest difference of a log-probability.
        n_same: At how many of `n` positions the most likely token is the same.
        loss: Nats per token of our model.
        loss_there: The same in llama.cpp.
    """

    largest: float = 0.0
    n_same: int = 0
    n: int = 0
    loss: float = 0.0
    loss_there: float = 0.0


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
def compare_answers(there: LlamaCpp, model: GPT, texts: list[list[int]], longest: int) -> Answers:
    """Compare the next token after each beginning of the texts, of at most `longest` tokens."""
    found, losses = Answers(), []
    for text in texts:
        ids = text[: min(N_TOKENS, longest - 1)]  # llama.cpp keeps a place for the answer
        if not ids:
            continue
        ours = model(torch.tensor([ids], device=model.device))[0].float().log_softmax(-1).cpu()
        for i, row in enumerate(ours):
            theirs = there.log_probabilities(ids[: i + 1], len(row))
            found.largest = max(found.largest, (row - theirs).abs().max().item())
            first, second = row.topk(2).values.tolist()
            found.n_same += int(row.argmax() == theirs.argmax() or first - second < MARGIN)
            found.n += 1
            if i + 1 < len(ids):
                losses.append((-row[ids[i + 1]].item(), -theirs[ids[i + 1]].item()))
    if losses:
        found.loss, found.loss_there = (sum(column) / len(losses) for column in zip(*losses))
    return found


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
