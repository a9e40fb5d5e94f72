"""A GGUF file is opened again and compared with the model that it was made from."""

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt.errors import UserError, require
from litgpt.export.architectures import Architecture
from litgpt.export.gguf_tensors import Tensor, source_rows
from litgpt.families.weights import Weights
from litgpt.generate.reference_outputs import PROMPTS
from litgpt.model.gpt import GPT
from litgpt.text.chat_template import clock_at
from litgpt.text.prompts import PromptStyle
from litgpt.text.tokenizer import Tokenizer

N_TOKENS = 24  # of each text, whose next tokens are compared
TOLERANCE = {"f32": 2e-2, "f16": 1e-1, "bf16": 1e-1}  # of log-probabilities; quantized weights change them more
MARGIN = 1e-3  # two tokens that are closer than this may change places


class LlamaCpp:
    """A GGUF file that llama.cpp has opened, through the package `xllamacpp`. It serves on a port of this machine.

    Args:
        n_context: How many tokens it reads at most.
        exact: Keep keys and values in float32, and compute attention without the fused kernel.
    """

    def __init__(self, path: Path, n_context: int, exact: bool = True) -> None:
        xllamacpp = require("xllamacpp", "export")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = n_context, 1
        params.warmup = params.fit_params = False
        params.n_gpu_layers = 0
        params.verbosity = -1
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as e:
            raise UserError(f"llama.cpp cannot open {path}: {e}.") from e
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(self, path: str, **request: Any) -> Any:
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with self.open(urllib.request.Request(self.server.listening_address + path, data, headers)) as answer:
            return json.load(answer)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def render(self, prompt: str) -> str:
        return self.ask("/apply-template", messages=[{"role": "user", "content": prompt}])["prompt"]

    def log_probabilities(self, ids: Sequence[int], n_vocabulary: int) -> torch.Tensor:
        """Of the next token, (V,)."""
        request = {"prompt": list(ids), "n_predict": 1, "n_probs": n_vocabulary, "temperature": 0.0}
        answer = self.server.handle_completions({**request, "cache_prompt": False})
        found = torch.full((n_vocabulary,), -torch.inf)
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found


@dataclass
class Parity:
    """How llama.cpp's answers from a file differ from ours."""

    other_ids: list[str] = field(default_factory=list)  # texts that it tokenizes in another way
    other_texts: list[str] = field(default_factory=list)  # prompts that it renders in another way
    n_texts: int = 0
    largest: float = 0.0  # difference of log-probabilities
    n_greedy: int = 0  # positions with the same most likely token, of ...
    n_positions: int = 0
    loss: float = 0.0  # of our model on the texts, nats per token
    loss_there: float = 0.0


@clock_at()
@torch.no_grad()
def compare(path: Path, model: GPT, tokenizer: Tokenizer, style: PromptStyle, has_template: bool) -> Parity:
    """Ask llama.cpp for the tokens, the prompts, and the probabilities of the texts of the reference outputs."""
    special, found = not style.own_special_tokens, Parity()
    longest = min(model.config.block_size, 512)
    there = LlamaCpp(path, longest)
    n_vocabulary, losses = model.config.padded_vocab_size, []
    for prompt in PROMPTS:
        text = style.prompt([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(text, special)
        rendered = there.render(prompt) if has_template else text
        found.n_texts += 1
        bos = tokenizer.bos_token or ""
        if rendered.removeprefix(bos) != text.removeprefix(bos):
            found.other_texts.append(prompt)
        if there.encode(text, special) != ids or there.encode(prompt) != tokenizer.encode(prompt):
            found.other_ids.append(prompt)
        ids = ids[: min(N_TOKENS, longest - 1)]
        ours = model(torch.tensor([ids]))[0].float().log_softmax(-1)
        for i, row in enumerate(ours):
            theirs = there.log_probabilities(ids[: i + 1], n_vocabulary)
            found.largest = max(found.largest, (row - theirs).abs().max().item())
            top = row.topk(2).values
            found.n_greedy += int(row.argmax() == theirs.argmax() or top[0] - top[1] < MARGIN)
            found.n_positions += 1
            if i + 1 < len(ids):
                losses.append((-row[ids[i + 1]].item(), -theirs[ids[i + 1]].item()))
    found.loss, found.loss_there = np.mean(losses, axis=0).tolist() if losses else (0.0, 0.0)
    return found


def compare_tensors(path: Path, weights: Weights, tensors: list[Tensor], found: Architecture) -> tuple[float, str]:
    """The largest difference between a weight in the file and ours, as a fraction of the largest number of its tensor,
    and the name of that tensor. A few rows are in memory at a time."""
    gguf = require("gguf", "export")
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if there.keys() != {tensor.name for tensor in tensors}:
        raise UserError(f"{path} has other tensors than were written. The disk may be damaged.")
    worst, where = 0.0, ""
    for tensor in tensors:
        stored, at, scale, difference = there[tensor.name], 0, 0.0, 0.0
        rows = stored.data.reshape(-1, stored.data.shape[-1])
        for ours in source_rows(tensor, weights, found):
            theirs = dequantized(gguf, rows[at : at + len(ours)], stored.tensor_type)
            difference = max(difference, float(np.abs(theirs - ours.numpy()).max()))
            scale = max(scale, float(ours.abs().max()))
            at += len(ours)
        if scale and difference / scale > worst:
            worst, where = difference / scale, tensor.name
    return worst, where


def dequantized(gguf: Any, rows: np.ndarray, kind: Any) -> np.ndarray:
    return gguf.quants.dequantize(rows, kind).reshape(len(rows), -1)


def has_llama_cpp() -> bool:
    return find_spec("xllamacpp") is not None
