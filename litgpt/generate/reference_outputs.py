"""Reference outputs: what a model answered when its folder was written, to compare with what it answers now."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Optional, get_args

import torch

from litgpt.errors import UserError
from litgpt.families.weights import Weights
from litgpt.generate.engine import common_prefix, generate
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import autocast_dtype
from litgpt.model.gpt import GPT
from litgpt.storage.files import read_json
from litgpt.storage.torch_file import NAMES
from litgpt.text.prompt_style import clock_at, now
from litgpt.text.prompts import PromptStyle
from litgpt.text.tokenizer import Tokenizer

FILE = "parity.json"
PROMPTS = (
    "Once upon a time",
    "What is the capital of France?",
    "Write a function that reverses a list.",
    "12 + 30 =",
    "Translate to German: Good morning!",
    "  spaces   and\ttabs\nand lines",
    "naïve café, 東京, 😀",
    "def f(x):\n    return x",
)
N_TOP, N_GREEDY = 5, 8
# how far logits may differ, as a fraction of the largest: rounding on another machine or in another kernel
TOLERANCE = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}
PRECISIONS = {"F32": "32-true", "F16": "16-true", "BF16": "bf16-true"}  # that compute in the type of the weights


@clock_at()  # one time for all prompts, also around midnight
def make_reference_outputs(
    model: GPT, tokenizer: Tokenizer, style: PromptStyle, stored: Sequence[str], scheme: Optional[str] = None
) -> dict[str, Any]:
    """What a model in evaluation mode answers to each of `PROMPTS`.

    Args:
        stored: The dtypes of the weights in the folder and in its base, by their names in safetensors.
        scheme: How the base is quantized.
    """
    special = not style.own_special_tokens
    computed = autocast_dtype(model.device) or model.dtype

    def outputs(prompt: str) -> dict[str, Any]:
        text = style.prompt([{"role": "user", "content": prompt}])
        ids = encode(model, tokenizer, text, special)
        top = last_logits(model, ids).topk(N_TOP)
        return {
            "prompt": prompt,
            "text": text,
            "ids": ids,
            "top_ids": top.indices.tolist(),
            "top_logits": top.values.tolist(),
            "greedy": list(generate(model, ids, N_GREEDY)),
        }

    return {
        "computed": NAMES[computed],
        "quantize": scheme,
        "stored": sorted(set(stored)),
        "special": special,
        **({"time": now().isoformat()} if style.printed_times() else {}),
        "prompts": [outputs(prompt) for prompt in PROMPTS],
    }


def encode(model: GPT, tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    return tokenizer.encode(text, special)[: model.config.block_size - N_GREEDY]


@torch.no_grad()
def last_logits(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """(V,), float32"""
    hidden = model.hidden(torch.tensor([list(ids)], device=model.device))
    return model.lm_head(hidden[0, -1]).float()


def write_reference_outputs(reference: dict[str, Any], folder: Path) -> None:
    text = json.dumps(reference, indent=1, ensure_ascii=False) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8", newline="\n")


def read_reference_outputs(folder: Path) -> dict[str, Any]:
    """Raises `UserError` if the file is damaged."""
    reference = read_json(folder / FILE)
    prompts = reference["prompts"]
    valid = all(p["ids"] and p["top_ids"] and len(p["top_ids"]) == len(p["top_logits"]) for p in prompts)
    try:
        datetime.fromisoformat(reference.get("time") or "2026-01-01")
    except ValueError:
        valid = False
    if not valid or not prompts or reference.get("quantize") not in (None, *get_args(QuantizeName)):
        raise UserError(f"{folder / FILE} is damaged: it does not hold complete reference outputs.")
    return reference


def changes(
    reference: dict[str, Any], model: GPT, tokenizer: Tokenizer, style: PromptStyle, stored: Sequence[str]
) -> dict[str, str]:
    """What has changed since the reference outputs were made, each with an example.

    Each is tested by itself: the template by the rendered text, the tokenizer by the ids of the recorded text, weights
    and precision by the logits after the recorded ids.
    """
    found: dict[str, str] = {}
    now_stored, was_stored = sorted(set(stored)), reference["stored"]
    if now_stored != was_stored:
        found["precision"] = f"weights are stored as {', '.join(now_stored)}, were {', '.join(was_stored)}"
    computed, was_computed = NAMES[model.dtype], reference["computed"]
    if computed != was_computed:
        found["precision"] = f"computed in {computed}, was {was_computed}"
    allowed = max(TOLERANCE.get(name, 0.0) for name in (computed, was_computed, *(stored if found else ())))
    if reference.get("quantize"):  # inputs are rounded too
        allowed = max(allowed, TOLERANCE["BF16"])
    time = reference.get("time") or time_of(reference["prompts"][0], style)
    for then in reference["prompts"]:
        with clock_at(time):
            text = style.prompt([{"role": "user", "content": then["prompt"]}])
        if text != then["text"]:
            found.setdefault("template", f"{then['prompt']!r} was rendered as {then['text']!r}, now {text!r}")
        ids = encode(model, tokenizer, then["text"], reference["special"])
        if ids != then["ids"]:
            at = common_prefix(ids, then["ids"])
            differ = f"are {ids[at : at + 8]}, were {then['ids'][at : at + 8]}"
            found.setdefault("tokenizer", f"the ids of {then['text']!r} from {at} on {differ}")
    worst, where = difference(reference, model)
    for then in reference["prompts"] if worst <= TOLERANCE["F32"] else ():
        greedy = list(generate(model, then["ids"], N_GREEDY))
        if greedy != then["greedy"]:
            found["weights"] = f"the greedy ids after {then['prompt']!r} are {greedy}, were {then['greedy']}"
    if not worst <= allowed:
        found["weights"] = f"logits after {where!r} differ by {worst:.1e} of the largest; rounding is {allowed:.0e}"
    return found


def time_of(then: dict[str, Any], style: PromptStyle) -> Optional[str]:
    """The time at which a prompt of legacy reference outputs, which do not record it, was rendered: the one that gives
    the recorded text. None if there is no such time."""
    for time in times_in(then["text"], style.time_formats):
        with clock_at(time):
            if style.prompt([{"role": "user", "content": then["prompt"]}]) == then["text"]:
                return time
    return None


def times_in(text: str, formats: Sequence[str]) -> Iterator[str]:
    """Whatever in a text can be read as a time in one of the formats."""
    for format in formats:
        parsable = re.sub("%[-#]", "%", format)  # without what only strftime knows
        parts = re.split("(%.)", parsable)
        pattern = "".join(r"\w{1,20}" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        for match in re.finditer(f"(?=({pattern}))", text):
            with suppress(ValueError):
                yield datetime.strptime(match[1], parsable).isoformat()


def difference(reference: dict[str, Any], model: GPT) -> tuple[float, str]:
    """How far the model's logits are from the recorded ones, as a fraction of the largest, and after which prompt. NaN
    if they are not finite; infinite if the vocabulary or the context has become too small."""
    worst, where = 0.0, ""
    for then in reference["prompts"]:
        too_long = len(then["ids"]) > model.config.block_size
        if too_long or max(*then["ids"], *then["top_ids"]) >= model.config.padded_vocab_size:
            return float("inf"), then["prompt"]
        top = torch.tensor(then["top_logits"])
        logits = last_logits(model, then["ids"])[then["top_ids"]].cpu()
        error = float((logits - top).abs().max() / top.abs().max().clamp(min=1))
        if not error <= worst:  # NaN is worse than any number
            worst, where = error, then["prompt"]
    return worst, where


def stored_dtypes(checkpoint: Weights) -> list[str]:
    return sorted(set(checkpoint.dtypes.values()))
