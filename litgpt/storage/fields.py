"""Schemas of small files by file name, and the check of a value against a schema.

A `Shape` is one of:

- a type (`float` is any number within float32's range),
- a `range` of integers,
- a `frozenset` of strings to choose from,
- None: null or a missing field,
- `[shape]`: a list,
- `{name: shape}`: an object; its other fields are not checked,
- an `Each`: an object with any fields,
- a `Text`: a string of limited length,
- a tuple: any of several shapes.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional, Union

from litgpt.errors import brief


class Each(NamedTuple):
    """An object whose fields all have the same shape. Their names match a regular expression; `label` is what messages
    call them."""

    shape: "Shape"
    names: str = r"[\s\S]*"
    label: str = "text"


class Text(NamedTuple):
    """A string of at most `max_chars` characters."""

    max_chars: int


Shape = Union[type, range, frozenset, None, list, dict, tuple, Each, Text]

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE = 2**18  # maximum characters of a chat template
LARGEST = 3.4e38
REPEATS = 4
COUNT, ID = range(1, 2**31), range(2**31)
IDS = (range(-1, 2**31), [ID], None)  # some files use -1 for none
FLAG = (bool, None)
TEXT = (str, None)
ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TOKEN_TEXT = Text(1000)
ADDED_TOKEN: Shape = {"content": TOKEN_TEXT, **dict.fromkeys(ADDED_FLAGS, FLAG)}
TOKEN = (TOKEN_TEXT, ADDED_TOKEN)
TOKEN_TABLES: dict[str, Shape] = {
    **dict.fromkeys(SPECIAL_TOKENS, (*TOKEN, None)),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), ([TOKEN], Each(TOKEN), None)),
}
TOKEN_IDS: dict[str, Shape] = dict.fromkeys(("bos_token_id", "eos_token_id"), IDS)
SUM = [int]  # size, CRC-32 and, in newer files, modification time
INDEX: Shape = {"weight_map": Each(str)}
CHAT_TEMPLATES = (Text(TEMPLATE), [{"name": str, "template": Text(TEMPLATE)}], Each(Text(TEMPLATE)), None)
SHAPES: dict[str, Shape] = {
    "config.json": TOKEN_IDS,  # families check the other fields
    "generation_config.json": TOKEN_IDS,
    "model.safetensors.index.json": INDEX,
    "pytorch_model.bin.index.json": INDEX,
    "tokenizer_config.json": {
        **TOKEN_TABLES,
        "added_tokens_decoder": (Each(ADDED_TOKEN, r"[0-9]{1,9}", "the id of a token"), None),
        "chat_template": CHAT_TEMPLATES,
        "tokenizer_class": TEXT,
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens"), FLAG),
    },
    "chat_template.json": {"chat_template": CHAT_TEMPLATES},
    "processor_config.json": {"chat_template": CHAT_TEMPLATES},
    "special_tokens_map.json": TOKEN_TABLES,
    "added_tokens.json": Each(ID, r"[\s\S]{0,1000}", "text of at most 1000 characters"),
    "adapter_config.json": {
        "peft_type": TEXT,
        "base_model_name_or_path": TEXT,
        "r": (COUNT, None),
        "lora_alpha": (float, None),
        "rank_pattern": (Each(COUNT), None),
        "alpha_pattern": (Each(float), None),
        "target_modules": (str, [str], None),
        **dict.fromkeys(("use_dora", "use_rslora", "ensure_weight_tying"), FLAG),
        "adapter_prompt_length": (COUNT, None),
        "adapter_start_layer": (ID, None),
    },
    "parity.json": {
        "computed": frozenset(("F32", "F16", "BF16")),
        "quantize": TEXT,
        "stored": [str],
        "special": bool,
        "time": TEXT,
        "prompts": [{"prompt": str, "text": str, "ids": [ID], "top_ids": [ID], "top_logits": [float], "greedy": [ID]}],
    },
    "run.lock": {
        **dict.fromkeys(("command", "repository", "order", "rows"), TEXT),
        **dict.fromkeys(("versions", "model", "adapter"), Each(str)),
        "machine": {},
        "data": [[str]],
        "losses": [str],
        "events": ([list], None),
        "check": ([str], None),
    },
    "checksums.json": {"step": (ID, None), "files": Each((SUM, [SUM]))},
    ".litgpt.json": {"files": Each((SUM, [SUM]))},
    "hyperparameters.yaml": {
        "checkpoint_dir": TEXT,
        "lora_r": (COUNT, None),
        "lora_alpha": (float, None),
        **dict.fromkeys(("lora_query", "lora_key", "lora_value"), FLAG),
    },
    "prompt_style.yaml": {
        **dict.fromkeys(("prompt_style", "template", "tool_use", "class_path"), TEXT),
        "variables": (Each(str), None),
        "init_args": ({"system_message": TEXT}, None),
    },
}


def misfit(value: Any, shape: Shape, name: str = "") -> Optional[str]:
    """What is wrong with a value, with the path of the field; None if it has the shape."""
    shapes = shape if type(shape) is tuple else (shape,)
    problems = [problem(value, one, name) for one in shapes]
    if None in problems:
        return None
    inner = [p for p in problems if p]
    expected = " or ".join(dict.fromkeys(map(describe, shapes)))
    return inner[0] if len(inner) == 1 else f"{prefix(name)}expected {expected}, got {brief(value)}."


def problem(value: Any, shape: Shape, name: str) -> Optional[str]:
    """None if a value has one shape, a sentence if a part of it does not, else an empty string."""
    if isinstance(shape, (dict, Each)) and isinstance(value, dict):
        return next(filter(None, in_object(value, shape, name)), None)
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (misfit(v, shape[0], f"{name}[{i}]") for i, v in enumerate(value))), None)
    if isinstance(shape, frozenset):
        fits = isinstance(value, str) and value in shape
    elif isinstance(shape, Text):
        fits = isinstance(value, str) and len(value) <= shape.max_chars
    elif isinstance(shape, range):
        fits = type(value) is int and value in shape
    elif shape is float:
        fits = is_number(value)
    else:
        fits = value is None if shape is None else type(value) is shape
    return None if fits else ""


def is_number(value: Any) -> bool:
    """Whether a value is a number within float32's range."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def in_object(value: dict, shape: Union[dict, Each], name: str) -> Iterator[Optional[str]]:
    """For each field, what is wrong with it, or None."""
    if isinstance(shape, dict):
        yield from (misfit(value.get(key), inner, f"{name}.{key}".lstrip(".")) for key, inner in shape.items())
        return
    for key, inner in value.items():
        if not isinstance(key, str) or not re.fullmatch(shape.names, key):
            yield f"{prefix(name)}expected {shape.label} as a field name, got {brief(key)}."
        yield misfit(inner, shape.shape, f"{name}.{brief(key)}".lstrip("."))


def pattern(text: str, around: str = "{}") -> re.Pattern:
    """Compile a regular expression from a file, in the place of {} in `around`. Raises `ValueError` if it is invalid,
    or could take exponential time because it repeats a group or has many repeats."""
    try:
        compiled = re.compile(around.format(text))
    except (re.error, RecursionError, OverflowError) as e:
        raise ValueError(f"{brief(text)} is not a regular expression: {e}") from e
    if re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > REPEATS:
        raise ValueError(f"{brief(text)} repeats a group, or has more than {REPEATS} repeats (*, + or {{}})")
    return compiled


def prefix(name: str) -> str:
    return f"{name}: " if name else ""


def describe(shape: Shape) -> str:
    if isinstance(shape, range):
        return f"an integer from {shape.start} to {shape.stop - 1}"
    if isinstance(shape, frozenset):
        return f"one of {', '.join(sorted(shape))}"
    if isinstance(shape, Text):
        return f"text of at most {shape.max_chars} characters"
    kinds = {Each: "an object", dict: "an object", list: "a list"}
    words = {None: "null", str: "text", bool: "true or false", int: "an integer", float: "a number"}
    return kinds.get(type(shape)) or words[shape]  # type: ignore[call-overload, index]
