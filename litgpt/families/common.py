"""What the `config.json` of several families has in common."""

from typing import Any

from litgpt.errors import UserError
from litgpt.model.rope import ROPE_TYPES

LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NUMBERS = {"default": (), "linear": ("factor",), "llama3": LLAMA3_NUMBERS}


def read_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """The rope part of a `Config`, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`.

    Raises:
        UserError: a rope type that is not implemented, or one of its numbers is missing.
    """
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    if not isinstance(fields.get(key) or {}, dict):
        raise UserError(f"config.json has {key} {fields[key]!r}; an object is wanted.")
    numbers = dict(fields.get(key) or {})
    rope_type = numbers.pop("rope_type", None) or numbers.pop("type", None) or "default"
    base = numbers.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise UserError(f"config.json has {key} of type {rope_type!r}; supported: {', '.join(ROPE_TYPES)}.")
    missing = [n for n in ROPE_NUMBERS[rope_type] if not isinstance(numbers.get(n), (int, float)) or numbers[n] <= 0]
    if missing:
        raise UserError(f"config.json has {key} of type {rope_type!r} without usable {', '.join(missing)}.")
    if float(numbers.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("config.json has partial_rotary_factor, which this family does not know.")
    return {"rope_base": float(base), "rope_type": rope_type, "rope_adjustments": numbers}


def whole(fields: dict[str, Any], key: str, *default: Any) -> Any:
    """A whole number above 0; the default where it is missing or null. Without a default it must be there.

    Raises:
        UserError: it is something else.
    """
    value = fields[key] if not default else fields.get(key)
    if value is None and default:
        return default[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {key} {value!r}; a whole number above 0 is wanted.")
    return value


def flag(fields: dict[str, Any], key: str) -> bool:
    """True or false; false where it is missing. Raises `UserError` if it is something else."""
    value = fields.get(key) or False
    if not isinstance(value, bool):
        raise UserError(f"config.json has {key} {value!r}; true or false is wanted.")
    return value


def require_value(fields: dict[str, Any], key: str, *allowed: Any) -> None:
    """Refuse a field that is there with a value that changes the math to one that is not implemented."""
    if key in fields and fields[key] not in allowed:
        choices = " or ".join(repr(a) for a in allowed)
        raise UserError(f"config.json has {key} {fields[key]!r}; only {choices} is implemented.")
