"""The parity seal: what a model answered when its folder was written, to compare with what it answers now."""

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
from litgpt.generate.engine import generate
from litgpt.methods.quantize import QuantizeName
from litgpt.model import GPT
from litgpt.storage.files import read_json
from litgpt.text.chat_template import clock_at, now
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
# how far logits may differ, as a share of the largest: rounding on another machine or in another kernel
TOLERANCE = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}
PRECISIONS = {"F32": "32-true", "F16": "16-true", "BF16": "bf16-true"}  # that compute in the type of the weights
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@clock_at()  # one time for all prompts, also around midnight
def make_seal(
    model: GPT, tokenizer: Tokenizer, style: PromptStyle, stored: Sequence[str], scheme: Optional[str] = None
) -> dict[str, Any]:
    """The seal of a model in evaluation mode.

    Args:
        stored: The dtypes of the weights in the folder and in its base, in safetensors' names.
        scheme: How the base is quantized.
    """
    return {
        "computed": NAMES[model.dtype],
        "quantize": scheme,
        "stored": sorted(set(stored)),
        "special": not style.own_special_tokens,
        **({"time": now().isoformat()} if style.printed_times() else {}),
        "prompts": [seal_prompt(model, tokenizer, style, prompt) for prompt in PROMPTS],
    }


def seal_prompt(model: GPT, tokenizer: Tokenizer, style: PromptStyle, prompt: str) -> dict[str, Any]:
    text = style.prompt([{"role": "user", "content": prompt}])
    ids = seal_ids(model, tokenizer, text, special=not style.own_special_tokens)
    top = last_logits(model, ids).topk(N_TOP)
    return {
        "prompt": prompt,
        "text": text,
        "ids": ids,
        "top_ids": top.indices.tolist(),
        "top_logits": top.values.tolist(),
        "greedy": list(generate(model, ids, N_GREEDY)),
    }


def seal_ids(model: GPT, tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    return tokenizer.encode(text, special)[: model.config.block_size - N_GREEDY]


@torch.no_grad()
def last_logits(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """(V,), float32"""
    hidden = model.hidden(torch.tensor([list(ids)], device=model.device))
    return model.lm_head(hidden[0, -1]).float()


def write_seal(seal: dict[str, Any], folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(seal, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def read_seal(folder: Path) -> dict[str, Any]:
    """Raises:
    UserError: the file is not a seal.
    """
    seal = read_json(folder / FILE)
    complete = all(p["ids"] and p["top_ids"] and len(p["top_ids"]) == len(p["top_logits"]) for p in seal["prompts"])
    try:
        datetime.fromisoformat(seal.get("time") or "2026-01-01")
    except ValueError:
        complete = False
    complete = complete and seal.get("quantize") in (None, *get_args(QuantizeName))
    if not seal["prompts"] or not complete:
        raise UserError(f"{folder / FILE} is a damaged parity seal.")
    return seal


def moved(
    seal: dict[str, Any], model: GPT, tokenizer: Tokenizer, style: PromptStyle, stored: Sequence[str]
) -> dict[str, str]:
    """What is no longer as it was sealed: template, tokenizer, weights or precision, each with an example.

    Each is judged by itself: the template by the rendered text, the tokenizer by the ids of the sealed text, weights
    and precision by the logits after the sealed ids.
    """
    found: dict[str, str] = {}
    if sorted(set(stored)) != seal["stored"]:
        found["precision"] = f"weights are stored as {', '.join(sorted(set(stored)))}, were {', '.join(seal['stored'])}"
    computed = NAMES[model.dtype]
    if computed != seal["computed"]:
        found["precision"] = f"computed in {computed}, was {seal['computed']}"
    allowed = max(TOLERANCE.get(name, 0.0) for name in (computed, seal["computed"], *(stored if found else ())))
    if seal.get("quantize"):  # inputs are rounded too
        allowed = max(allowed, TOLERANCE["BF16"])
    time = seal.get("time") or time_of(seal["prompts"][0], style)
    for then in seal["prompts"]:
        with clock_at(time):
            text = style.prompt([{"role": "user", "content": then["prompt"]}])
        if text != then["text"]:
            found.setdefault("template", f"{then['prompt']!r} was rendered as {then['text']!r}, now {text!r}")
        ids = seal_ids(model, tokenizer, then["text"], seal["special"])
        if ids != then["ids"]:
            shared = min(len(ids), len(then["ids"]))
            at = next((i for i in range(shared) if ids[i] != then["ids"][i]), shared)
            was = then["ids"][at : at + 8]
            found.setdefault(
                "tokenizer", f"the ids of {then['text']!r} from {at} on are {ids[at : at + 8]}, were {was}"
            )
    worst, where = difference(seal, model)
    for then in seal["prompts"] if worst <= TOLERANCE["F32"] else ():
        greedy = list(generate(model, then["ids"], N_GREEDY))
        if greedy != then["greedy"]:
            found["weights"] = f"the greedy ids after {then['prompt']!r} are {greedy}, were {then['greedy']}"
    if not worst <= allowed:
        found["weights"] = f"logits after {where!r} differ by {worst:.1e} of the largest, {allowed:.0e} is rounding"
    return found


def time_of(then: dict[str, Any], style: PromptStyle) -> Optional[str]:
    """The time at which a prompt of an older seal, which does not have it, was rendered: the one that gives the sealed
    text. None if there is no such time."""
    for time in times_in(then["text"], style.time_formats):
        with clock_at(time):
            if style.prompt([{"role": "user", "content": then["prompt"]}]) == then["text"]:
                return time
    return None


def times_in(text: str, formats: Sequence[str]) -> Iterator[str]:
    """Whatever in a text reads like a time in one of the formats."""
    for format in formats:
        plain = re.sub("%[-#]", "%", format)  # without what only strftime knows
        pattern = "".join(r"\w{1,20}" if i % 2 else re.escape(part) for i, part in enumerate(re.split("(%.)", plain)))
        for match in re.finditer(f"(?=({pattern}))", text):
            with suppress(ValueError):
                yield datetime.strptime(match[1], plain).isoformat()


def difference(seal: dict[str, Any], model: GPT) -> tuple[float, str]:
    """How far the model's logits are from the sealed ones, as a share of the largest, and after which prompt.

    NaN where they are not finite, infinite where the vocabulary or the context became too small.
    """
    worst, where = 0.0, ""
    for then in seal["prompts"]:
        too_long = len(then["ids"]) > model.config.block_size
        if too_long or max(*then["ids"], *then["top_ids"]) >= model.config.padded_vocab_size:
            return float("inf"), then["prompt"]
        top = torch.tensor(then["top_logits"])
        now = last_logits(model, then["ids"])[then["top_ids"]].cpu()
        share = float((now - top).abs().max() / top.abs().max().clamp(min=1))
        if not share <= worst:  # NaN is worse than any number
            worst, where = share, then["prompt"]
    return worst, where


def stored_dtypes(checkpoint: Weights) -> list[str]:
    return sorted(set(checkpoint.dtypes.values()))
