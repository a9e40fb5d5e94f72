"""Reading single fields of a `config.json`, so that a wrong type is an error that names the field.

A null means what it means in `transformers`. `without_nulls` first removes those that mean the same as a missing field.
"""

from typing import Any

from litgpt.errors import UserError
from litgpt.model.config import MOST_LAYERS
from litgpt.storage.fields import is_number

NULLS = {  # null has a meaning of its own here; elsewhere it means the same as a missing field
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),  # none
    "num_key_value_heads",  # as many as heads
    "factor",  # of YaRN: the ratio of the lengths
    # false, although true is the default
    *("tie_word_embeddings", "attention_bias", "use_parallel_residual", "multi_query", "parallel_attn"),
    *("scale_attn_weights", "truncate"),
}
LARGEST = 2**31 - 1  # integer
MOST = {"num_hidden_layers": MOST_LAYERS, "n_layer": MOST_LAYERS}


class MissingField(UserError):
    """A required field is missing. `key` names it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"config.json lacks the field {key!r}.")
        self.key = key


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` and of the objects in it, without the nulls that mean a missing field."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if value is not None or key in NULLS
    }


def integer(fields: dict[str, Any], key: str, *default: Any) -> Any:
    """A positive integer; the default, if there is one, for a missing field or null. Raises `UserError` otherwise."""
    value = fields.get(key)
    if value is None and default:
        return default[0]
    if key not in fields:
        raise MissingField(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {key} {value!r}. Expected an integer above 0.")
    if value > MOST.get(key, LARGEST):
        raise UserError(f"config.json has {key} {value}. The largest supported value is {MOST.get(key, LARGEST)}.")
    return value


def number(fields: dict[str, Any], key: str, default: Any) -> Any:
    """A number; the default if it is missing or null. Raises `UserError` if it is something else."""
    value = fields.get(key)
    if value is None:
        return default
    if not is_number(value):
        raise UserError(f"config.json has {key} {value!r}. Expected a number.")
    return float(value) if abs(value) >= 2**63 else value


def flag(fields: dict[str, Any], key: str, default: bool = False) -> bool:
    """True or false; the default if it is missing, false if it is null. Raises `UserError` if it is something else."""
    value = fields.get(key, default) or False
    if not isinstance(value, bool):
        raise UserError(f"config.json has {key} {value!r}. Expected true or false.")
    return value


def require_value(fields: dict[str, Any], key: str, *allowed: Any) -> None:
    """Raise `UserError` if a field is there with a value that asks for math that is not implemented."""
    if key in fields and fields[key] not in allowed:
        choices = " or ".join(repr(a) for a in allowed)
        raise UserError(f"config.json has {key} {fields[key]!r}. Only {choices} is implemented.")
