"""`litgpt export`"""

import math
from collections import Counter
from pathlib import Path
from typing import Literal, Optional

import torch

from litgpt.checkpoint.hub import display_name
from litgpt.errors import UserError, require
from litgpt.export.architectures import Architecture, architecture, context_length
from litgpt.export.gguf_file import write_gguf
from litgpt.export.gguf_tensors import Tensor, gguf_tensors
from litgpt.export.gguf_tokenizer import Vocabulary, vocabulary
from litgpt.export.llama_cpp import is_installed, llama_cpp
from litgpt.export.parity import (
    Texts,
    compare_answers,
    compare_tensors,
    compare_texts,
    context_to_open,
)
from litgpt.families import weight_map
from litgpt.families.weights import Weights, check_weights
from litgpt.methods.merged import MergedWeights
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.storage.outputs import check_file, exclusive, put_single
from litgpt.text.prompts import STYLE_FILE, jinja_templates
from litgpt.text.styles import STYLES

TypeName = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]
LARGE = 2 * 10**9  # bytes in float32 above which only the tensors of a file are compared
TOLERANCE = {"f32": 2e-2, "f16": 1e-1, "bf16": 3e-1}  # of log-probabilities; quantization changes more
ROUNDING = {"f32": 0.0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2}  # of numbers, as a fraction of the largest


def main(
    checkpoint_dir: Path,
    to: Literal["gguf"] = "gguf",
    type: Optional[TypeName] = None,
    out: Optional[Path] = None,
    base: Optional[Path] = None,
    parity: Literal["auto", "answers", "tensors"] = "auto",
    overwrite: bool = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp, Ollama, and LM Studio, and compare the file with the model.

    A LoRA adapter is merged into its base while the file is written.

    Args:
        checkpoint_dir: A model folder or an adapter folder, or the name of a model under checkpoints/.
        to: The format.
        type: Type of the weights. Default: that of the model.
        out: The file. Default: out/export/NAME-TYPE.gguf.
        base: The base model of an adapter, instead of the recorded one.
        parity: What to compare: the answers of llama.cpp, which needs the package xllamacpp and the model in memory, or
            the numbers in the file. auto compares answers if xllamacpp is installed and the model is small.
        overwrite: Replace a file that litgpt did not write.
    """
    require("gguf", "export")
    source = ModelSource.open(checkpoint_dir, base, merged=False)
    weights = merged_weights(source)
    found = architecture(weights.config)
    with torch.device("meta"):
        check_weights(GPT(weights.config), weights)
    named = type or stored_type(weights)
    tokens = make_vocabulary(source, weights.config)
    tensors = gguf_tensors(weights, found, named)
    name = display_name(source.folder)
    out = out or Path("out", "export", f"{name.rpartition('/')[2]}-{named}.gguf")
    check_file(out, overwrite, "--out")
    if out.suffix != ".gguf":
        raise UserError(f"--out {out} must end with .gguf.")
    if parity == "answers" and not is_installed():
        raise UserError("--parity answers needs the package xllamacpp. Run: pip install xllamacpp")
    print(f"model      {source.folder}, {weights.config.model_type}")
    if source.adapter is not None:
        print(f"base       {source.checkpoint.folder}")
    temporary = out.with_name(f".{out.name}.tmp")
    with exclusive(out, "--out"):
        try:
            write_gguf(temporary, weights, tensors, tokens, found, named, name)
            put_single(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    print(f"written    {out}, {out.stat().st_size / 1e6:,.1f} MB")
    for line in remarks(weights, found, tensors, tokens):
        print(line)
    numbers = sum(math.prod(tensor.shape) for tensor in tensors)
    if not is_installed():
        print("parity     xllamacpp is not installed, so llama.cpp was not asked: pip install xllamacpp")
    answers = parity == "answers" or (parity == "auto" and is_installed() and 4 * numbers <= LARGE)
    if is_installed():
        ask_llama_cpp(out, source, found, named, tokens, answers)
    if not answers:
        worst, where = compare_tensors(out, weights, tensors, found)
        print(f"parity     numbers in the file differ by at most {worst:.1e} of the largest in their tensor ({where})")
        if not worst <= ROUNDING.get(named, 0.5):
            raise UserError(f"{out} does not have the numbers of the model. The disk may be damaged.")


def merged_weights(source: ModelSource) -> Weights:
    """The weights of a model with its LoRA adapter merged. Raises `UserError` for adapters that cannot be merged."""
    if source.adapter is None:
        return source.weights()
    if not isinstance(source.adapter, LoRAFolder):
        raise UserError(
            f"{source.folder} has a {source.adapter.description}, which cannot be merged. Only litgpt can use it."
        )
    return MergedWeights(source.weights(), source.adapter)


def stored_type(weights: Weights) -> str:
    """The type that keeps the weights as they are."""
    kinds = set(weights.dtypes.values())
    return {frozenset({"BF16"}): "bf16", frozenset({"F16"}): "f16"}.get(frozenset(kinds), "f32")


def make_vocabulary(source: ModelSource, config: Config) -> Vocabulary:
    """The tokenizer with the chat template that the model was trained with."""
    tokenizer, style = source.tokenizer(), source.style()
    is_chosen = style is not STYLES["none"] or (source.folder / STYLE_FILE).is_file()
    templates = jinja_templates(style, tokenizer.prefix, tokenizer.eos_token or "") if is_chosen else {}
    found = vocabulary(tokenizer, config.padded_vocab_size, tokenizer.stops(style), templates)
    if not templates:
        found.notes.append("there is no chat template, so llama.cpp uses its own in a chat")
    return found


def remarks(weights: Weights, found: Architecture, tensors: list[Tensor], tokens: Vocabulary) -> list[str]:
    """Lines about the types of the tensors, and about what the file does not say."""
    config, kept = weights.config, weight_map(weights.config).kept
    counts = Counter(tensor.kind.lower() for tensor in tensors)
    lines = [f"types      {', '.join(f'{n} tensors {kind}' for kind, n in counts.most_common())}"]
    fallbacks = Counter((t.fallback.lower(), t.kind.lower(), t.shape[-1]) for t in tensors if t.fallback)
    lines += [
        f"note       {n} tensors have the type {kind} instead of {wanted}, which does not fit rows of {size} numbers"
        for (wanted, kind, size), n in fallbacks.items()
    ]
    if others := [name for name in weights.files if kept.search(name)]:
        lines.append(f"note       {len(others)} weights of another part are left out, such as {others[0]}")
    length = context_length(config, found)
    if length < config.block_size:
        lines.append(
            f"note       the context is limited to {length:,} tokens, because llama.cpp has no sliding window for "
            f"{found.name}"
        )
    if config.rope_type == "longrope":
        original = config.rope_adjustments["original_max_position_embeddings"]
        lines.append(f"note       llama.cpp uses the factors for long texts if its context exceeds {original:,} tokens")
    return [*lines, *(f"note       {note}" for note in tokens.notes)]


def ask_llama_cpp(
    out: Path, source: ModelSource, found: Architecture, named: str, tokens: Vocabulary, answers: bool
) -> None:
    """Print how llama.cpp's tokens, prompts, and answers compare with ours. Raises `UserError` if the answers of a file
    without quantization differ by more than rounding."""
    tokenizer, style = source.tokenizer(), source.style()
    with llama_cpp(out, context_to_open(source.config)) as there:
        texts = compare_texts(there, tokenizer, style, bool(tokens.templates))
        compared = None
        if answers:
            model = source.model(torch.float32, torch.device("cpu"))
            compared = compare_answers(there, model, texts.ids, context_length(source.config, found))
    for line in text_lines(texts):
        print(line)
    if compared is None:
        return
    print(
        f"parity     greedy tokens agree at {compared.n_same} of {compared.n} positions; log-probabilities differ by "
        f"at most {compared.largest:.1e}"
    )
    if named not in TOLERANCE:
        print(f"parity     loss on the reference texts {compared.loss:.4f}, in llama.cpp {compared.loss_there:.4f}")
    elif not compared.largest <= TOLERANCE[named]:
        raise UserError(
            f"llama.cpp answers differently from {out} than the model does: log-probabilities differ by "
            f"{compared.largest:.1e}. Do not use the file, and report the model's config.json."
        )


def text_lines(texts: Texts) -> list[str]:
    same = texts.n - len(texts.other_ids)
    line = f"parity     llama.cpp has the same token ids for {same} of {texts.n} texts"
    if texts.rendered:
        line += f" and the same prompt for {texts.n - len(texts.other_prompts)}"
    lines = [line]
    lines += [f"note       other token ids: {text!r}" for text in texts.other_ids[:3]]
    return lines + [f"note       another prompt: {text!r}" for text in texts.other_prompts[:3]]
