"""A model as a GGUF file: what it is made of, writing it, and comparing it with the model."""

import math
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, Optional

import torch

from litgpt.checkpoint.hub import display_name
from litgpt.errors import UserError, require
from litgpt.export.architectures import architecture, context_length
from litgpt.export.gguf_file import write_gguf
from litgpt.export.gguf_tensors import gguf_tensors
from litgpt.export.gguf_tokenizer import Vocabulary, vocabulary
from litgpt.export.llama_cpp import is_installed, llama_cpp
from litgpt.export.parity import Answers, Texts, compare_answers, compare_tensors, compare_texts, context_to_open
from litgpt.families import weight_map
from litgpt.families.weights import Weights, check_weights
from litgpt.methods.merged import MergedWeights
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.model.gpt import GPT
from litgpt.text.prompts import STYLE_FILE, jinja_templates
from litgpt.text.styles import STYLES

Parity = Literal["auto", "answers", "tensors"]
Line = tuple[str, str]  # its heading and its text
LARGE = 2 * 10**9  # bytes in float32 above which only the tensors of a file are compared
TOLERANCE = {"f32": 2e-2, "f16": 1e-1, "bf16": 3e-1}  # of log-probabilities; quantization changes more
ROUNDING = {"f32": 0.0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}  # of numbers, as a fraction of the largest
LOST = 0.25  # of what a finetune gained, above which quantization is remarked upon


class GGUFModel:
    """A model with its adapter merged, or its base alone, and the tokenizer of the folder that was opened.

    Args:
        type: The type of most weights. None for that of the model.
        merge: Whether the weights include the adapter.

    Raises:
        UserError: GGUF cannot express the model, its adapter, or its tokenizer.
    """

    def __init__(self, source: ModelSource, type: Optional[str], merge: bool = True) -> None:
        require("gguf", "export")
        self.source, self.name = source, display_name(source.folder)
        self.weights = merged_weights(source) if merge else source.checkpoint
        self.architecture = architecture(self.weights.config)
        with torch.device("meta"):
            check_weights(GPT(self.weights.config), self.weights)
        self.type = type or stored_type(self.weights)
        self.tensors = gguf_tensors(self.weights, self.architecture, self.type)
        self.vocabulary = make_vocabulary(source, self.weights.config.padded_vocab_size)

    @property
    def stem(self) -> str:
        """The first part of the names of its files."""
        return self.name.rpartition("/")[2]

    @cached_property
    def size(self) -> int:
        """Bytes in float32."""
        return 4 * sum(math.prod(tensor.shape) for tensor in self.tensors)

    def write(self, path: Path) -> None:
        write_gguf(path, self.weights, self.tensors, self.vocabulary, self.architecture, self.type, self.name)

    def remarks(self) -> Iterator[Line]:
        """Lines about the types of the tensors, and about what the file does not say."""
        config, kept = self.weights.config, weight_map(self.weights.config).kept
        counts = Counter(tensor.kind.lower() for tensor in self.tensors)
        yield "types", ", ".join(f"{n} tensors {kind}" for kind, n in counts.most_common())
        fallbacks = Counter((t.fallback.lower(), t.kind.lower(), t.shape[-1]) for t in self.tensors if t.fallback)
        for (wanted, kind, size), n in fallbacks.items():
            yield (
                "note",
                f"{n} tensors have the type {kind} instead of {wanted}, which rows of {size} numbers do not fit",
            )
        if others := [name for name in self.weights.files if kept.search(name)]:
            yield "note", f"{len(others)} weights of another part are left out, such as {others[0]}"
        length = context_length(config, self.architecture)
        if length < config.block_size:
            name = self.architecture.name
            yield "note", f"the context is limited to {length:,} tokens; llama.cpp has no sliding window for {name}"
        if config.rope_type == "longrope":
            original = config.rope_adjustments["original_max_position_embeddings"]
            yield "note", f"llama.cpp uses the factors for long texts if its context exceeds {original:,} tokens"
        for note in self.vocabulary.notes:
            yield "note", note

    def parity(self, out: Path, parity: Parity, lora: Optional[Path] = None) -> Iterator[Line]:
        """Compare the file with the model. Raises `UserError` if they differ by more than rounding.

        Args:
            lora: The file of an adapter over it, with which llama.cpp is asked.
        """
        if not is_installed():
            yield "parity", "xllamacpp is not installed, so llama.cpp was not asked: pip install xllamacpp"
        answers = is_installed() and (parity == "answers" or (parity == "auto" and self.size <= LARGE))
        if is_installed():
            yield from self.ask_llama_cpp(out, answers, lora)
        if not answers:
            worst, where = compare_tensors(out, self.weights, self.tensors, self.architecture)
            yield (
                "parity",
                f"numbers in the file differ by at most {worst:.1e} of the largest in their tensor ({where})",
            )
            if not worst <= ROUNDING.get(self.type, 0.5):
                raise UserError(f"{out} does not have the numbers of the model. The disk may be damaged.")

    def ask_llama_cpp(self, out: Path, answers: bool, lora: Optional[Path]) -> Iterator[Line]:
        """How llama.cpp's tokens, prompts, and answers compare with ours. Raises `UserError` if the answers of a file
        without quantization differ by more than rounding."""
        source = self.source
        tokenizer, style = source.tokenizer(), source.style()
        with llama_cpp(out, context_to_open(source.config), lora=lora) as there:
            texts = compare_texts(there, tokenizer, style, bool(self.vocabulary.templates))
            yield from text_lines(texts)
            if not answers:
                return
            model = source.model(torch.float32, torch.device("cpu"))
            length, stops = context_length(source.config, self.architecture), tokenizer.stops(style)
            found = compare_answers(there, source, model, texts.ids, length, stops)
        yield (
            "parity",
            f"greedy tokens agree at {found.n_same} of {found.n} positions; log-probabilities differ by at most "
            f"{found.largest:.1e}",
        )
        if self.type not in TOLERANCE:
            yield from loss_lines(found, self.type, lora is None)
        elif not found.largest <= TOLERANCE[self.type]:
            raise UserError(
                f"llama.cpp answers differently from {out} than the model does: log-probabilities differ by "
                f"{found.largest:.1e}. Do not use the file, and report the model's config.json."
            )


def merged_weights(source: ModelSource) -> Weights:
    """The weights of a model with its LoRA adapter merged. Raises `UserError` for adapters that cannot be merged."""
    if source.adapter is None:
        return source.weights()
    return MergedWeights(source.weights(), lora_folder(source))


def lora_folder(source: ModelSource) -> LoRAFolder:
    if not isinstance(source.adapter, LoRAFolder):
        raise UserError(
            f"{source.folder} has a {source.adapter.description}, which cannot be merged. Only litgpt can use it."
            if source.adapter
            else f"{source.folder} is not an adapter folder. Use --to gguf."
        )
    return source.adapter


def stored_type(weights: Weights) -> str:
    """The type that keeps the weights as they are."""
    kinds = set(weights.dtypes.values())
    return {frozenset({"BF16"}): "bf16", frozenset({"F16"}): "f16"}.get(frozenset(kinds), "f32")


def make_vocabulary(source: ModelSource, n_embeddings: int) -> Vocabulary:
    """The tokenizer with the chat template that the model was trained with."""
    tokenizer, style = source.tokenizer(), source.style()
    is_chosen = style is not STYLES["none"] or (source.folder / STYLE_FILE).is_file()
    templates = jinja_templates(style, tokenizer, blank=False) if is_chosen else {}
    found = vocabulary(tokenizer, n_embeddings, tokenizer.stops(style), templates)
    if not templates:
        found.notes.append("there is no chat template, so llama.cpp uses its own in a chat")
    return found


def text_lines(texts: Texts) -> Iterator[Line]:
    same = texts.n - len(texts.other_ids)
    prompts = f" and the same prompt for {texts.n - len(texts.other_prompts)}" if texts.rendered else ""
    yield "parity", f"llama.cpp has the same token ids for {same} of {texts.n} texts{prompts}"
    for text in texts.other_ids[:3]:
        yield "note", f"other token ids: {text!r}"
    for text in texts.other_prompts[:3]:
        yield "note", f"another prompt: {text!r}"


def loss_lines(found: Answers, type: str, merged: bool) -> Iterator[Line]:
    """What quantization changes, and how much of what a finetune gained it loses."""
    yield "parity", f"loss on the model's own answers {found.loss:.4f}, with {type} {found.loss_there:.4f}"
    if found.loss_base is None:
        return
    gained, lost = found.loss_base - found.loss, found.loss_there - found.loss
    if lost > LOST * gained > 0:
        remedy = "Export the adapter alone, over a quantized base: --to gguf-lora" if merged else "Use a larger type"
        yield (
            "note",
            f"{type} loses {lost / gained:.0%} of what the finetune gained (the base has {found.loss_base:.4f}). "
            f"{remedy}",
        )
