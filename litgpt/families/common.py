"""What the `config.json` of several families has in common.

A field that is missing has the value that `transformers` gives it, which differs between families. Rates of dropout are
not read: no dropout is applied to pretrained weights.
"""

from collections.abc import Sequence
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.model.config import MOST_LAYERS
from litgpt.model.rope import ROPE_TYPES
from litgpt.storage.fields import is_number

LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")
ROPE_NUMBERS = {"linear": ("factor",), "llama3": LLAMA3_NUMBERS, "yarn": ("factor",)}  # that must be there
ALL_ROPE_NUMBERS = {  # that may be there; others could mean something that is not implemented
    "default": set(),
    "linear": {"factor"},
    "llama3": {*LLAMA3_NUMBERS, "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {
        *("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
        *("short_mscale", "long_mscale"),  # in early Phi-3 files; without effect in transformers
    },
}
NULLS = {  # where null says something of its own; elsewhere it says the same as a field that is missing
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),  # none
    "num_key_value_heads",  # as many as heads
    "factor",  # of YaRN: the ratio of the lengths
    # false, although true is the default
    *("tie_word_embeddings", "attention_bias", "use_parallel_residual", "multi_query", "parallel_attn"),
    *("scale_attn_weights", "truncate"),
}
LARGEST = 2**31 - 1  # of whole numbers
MOST = {"num_hidden_layers": MOST_LAYERS, "n_layer": MOST_LAYERS}
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


class MissingField(UserError):
    """A field that must be there is not. `key` names it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"config.json lacks the field {key!r}.")
        self.key = key


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json`, and those of objects in it, without the nulls that stand for a missing field."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if value is not None or key in NULLS
    }


def read_sizes(
    fields: dict[str, Any], kv_heads: Optional[int] = None, head_dim: Optional[int] = None
) -> dict[str, Any]:
    """The sizes of a `Config`, under the names that most families give them.

    Args:
        kv_heads: Where `num_key_value_heads` is missing; as many as heads by default.
        head_dim: Where `head_dim` is missing; the width divided by the heads by default.
    """
    return {
        "block_size": whole(fields, "max_position_embeddings"),
        "padded_vocab_size": whole(fields, "vocab_size"),
        "n_layer": whole(fields, "num_hidden_layers"),
        "n_embd": whole(fields, "hidden_size"),
        "n_head": whole(fields, "num_attention_heads"),
        "n_query_groups": whole({"num_key_value_heads": kv_heads} | fields, "num_key_value_heads", None),
        "head_size": whole({"head_dim": head_dim} | fields, "head_dim", None),
        "intermediate_size": whole(fields, "intermediate_size"),
    }


def read_gate(fields: dict[str, Any], key: str = "hidden_act", default: str = "silu") -> dict[str, Any]:
    """The gated feed-forward part of a `Config`, from the name of its activation.

    Raises:
        UserError: an activation that is not implemented.
    """
    name = fields.get(key, default)
    if name in ("silu", "swish"):
        return {"mlp_class_name": "LLaMAMLP"}
    return {"mlp_class_name": "GemmaMLP", "gelu_approximate": gelu(fields, key, default, "silu")}


def gelu(fields: dict[str, Any], key: str, default: str, *others: str) -> str:
    """Which GELU an activation is. Raises `UserError` if it is none."""
    name = fields.get(key, default)
    if not isinstance(name, str) or name not in GELUS:
        choices = ", ".join((*others, *GELUS))
        raise UserError(f"config.json has {key} {name!r}; only these are implemented: {choices}.")
    return GELUS[name]


def read_rope(
    fields: dict[str, Any],
    base: float = 10000.0,
    base_key: str = "rope_theta",
    partial: Optional[float] = None,
    partial_key: str = "partial_rotary_factor",
    types: Sequence[str] = tuple(ROPE_TYPES),
) -> dict[str, Any]:
    """The rope part of a `Config`, from `rope_parameters` or from older fields like `rope_theta` and `rope_scaling`.

    Args:
        base: Where none is given.
        partial: The share of a head that rotates where none is given; None in families where all of it must.

    Raises:
        UserError: a rope type that is not implemented, or one of its numbers is missing or unknown.
    """
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    numbers = rope_object(fields.get(key), key)
    rope_type = rope_numbers(fields, numbers, key, types)
    share = float(number(numbers, "partial_rotary_factor", number(fields, partial_key, partial or 1.0)))
    numbers.pop("partial_rotary_factor", None)
    if not 0 < share <= 1 or (partial is None and share != 1):
        raise UserError(f"config.json has {partial_key} {share:g}, which is not implemented for this family.")
    theta = number(numbers, "rope_theta", number(fields, base_key, base))
    numbers.pop("rope_theta", None)
    known = ALL_ROPE_NUMBERS[rope_type]
    numbers = {name: value for name, value in numbers.items() if value is not None or name in known}
    refuse_unknown(numbers, key, rope_type)
    for name, value in numbers.items():
        if not isinstance(value, (bool, list)):
            number(numbers, name, None)
    return {
        "rope_base": float(theta),
        "rope_type": rope_type,
        "rope_adjustments": numbers,
        **({"rotary_percentage": share} if partial is not None else {}),
    }


def read_two_ropes(fields: dict[str, Any], base: float, local_base: float, local_key: str) -> dict[str, Any]:
    """The rope part of a `Config` with one rope for global layers and one, of the default type, for local layers.

    Newer files have `rope_parameters` with an object for each; in older ones `rope_theta` and `rope_scaling` are those
    of the global layers.
    """
    both = rope_object(fields.get("rope_parameters"), "rope_parameters")
    beside = {key: both.pop(key) for key in ("truncate",) if key in both}  # where transformers looks for it
    unknown = {key for key, value in both.items() if value is not None} - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(
            f"config.json has rope_parameters with {', '.join(sorted(unknown))} beside the two layer types."
        )
    everywhere = rope_object(both.get("full_attention"), "rope_parameters.full_attention")
    local = rope_object(both.get("sliding_attention"), "rope_parameters.sliding_attention")
    if local.get("rope_type", local.get("type", "default")) != "default":
        raise UserError("config.json has rope_parameters.sliding_attention of another type than 'default'.")
    if everywhere.pop("truncate", True) not in (True, None):
        raise UserError("config.json has truncate in rope_parameters.full_attention, which transformers does not read.")
    everywhere |= beside | rope_object(fields.get("rope_scaling"), "rope_scaling")
    flat = {k: v for k, v in fields.items() if k != "rope_scaling"} | {"rope_parameters": everywhere}
    local_base = float(number(local, "rope_theta", number(fields, local_key, local_base) if local_key else local_base))
    return read_rope(flat, base=base) | {"rope_local_base_freq": local_base}


def rope_object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise UserError(f"config.json has {key} {value!r}; an object is wanted.")
    return dict(value or {})


def rope_numbers(fields: dict[str, Any], numbers: dict[str, Any], key: str, types: Sequence[str]) -> str:
    """The type of a rope, taken out of its numbers, which are completed and checked."""
    old_type = numbers.pop("type", None)
    rope_type = numbers.pop("rope_type", None) or old_type or "default"
    if not isinstance(rope_type, str) or rope_type not in types:
        raise UserError(f"config.json has {key} of type {rope_type!r}; supported: {', '.join(types)}.")
    wanted = list(ROPE_NUMBERS.get(rope_type, ()))
    if rope_type in ("llama3", "yarn", "longrope"):
        key_of_length = "original_max_position_embeddings"
        if fields.get(key_of_length) is not None:  # beside the rope it wins over the rope's own
            numbers[key_of_length] = fields[key_of_length]
        numbers.setdefault(key_of_length, fields.get("max_position_embeddings"))
        wanted.append(key_of_length)
        if rope_type == "longrope" or numbers.get("factor", 0) is None:
            ratio = whole(fields, "max_position_embeddings") / whole(numbers, key_of_length)
            numbers["factor"] = number(numbers, "factor", ratio)
    missing = [n for n in wanted if not is_number(numbers.get(n)) or numbers[n] <= 0]
    if rope_type == "longrope":
        lists = {n: numbers.get(n) for n in ("short_factor", "long_factor")}
        missing += [
            n
            for n, values in lists.items()
            if not isinstance(values, list) or not all(is_number(v) and v > 0 for v in values)
        ]
    if missing:
        raise UserError(f"config.json has {key} of type {rope_type!r} without usable {', '.join(missing)}.")
    return rope_type


def refuse_unknown(numbers: dict[str, Any], key: str, rope_type: str) -> None:
    unknown = sorted(set(numbers) - ALL_ROPE_NUMBERS[rope_type])
    if unknown:
        raise UserError(f"config.json has {', '.join(unknown)} in {key} of type {rope_type!r}, which is not known.")


def read_windows(fields: dict[str, Any], default: Optional[Sequence[str]] = None, size: Any = None) -> dict[str, Any]:
    """The sliding windows of a `Config`, from `layer_types` and `sliding_window`.

    Args:
        default: The types of the layers where `layer_types` is missing.
        size: The window where `sliding_window` is missing.

    Raises:
        UserError: another type of layer, or local layers without a window.
    """
    types = fields.get("layer_types") or list(default or ["full_attention"] * whole(fields, "num_hidden_layers"))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or not all(t in known for t in types):
        raise UserError(f"config.json has layer_types {types!r}; a list of {' and '.join(known)} is wanted.")
    n_layer = whole(fields, "num_hidden_layers")
    if len(types) != n_layer:
        raise UserError(f"config.json has {len(types)} layer_types for {n_layer} layers.")
    local = [int(t == "sliding_attention") for t in types]
    if not any(local):
        return {}
    return {
        "sliding_window_size": whole({"sliding_window": size} | fields, "sliding_window"),
        "sliding_window_indices": local,
    }


def read_late_windows(fields: dict[str, Any], size: Any = 4096) -> dict[str, Any]:
    """The sliding windows of Qwen: off unless `use_sliding_window`, and then from layer `max_window_layers` on."""
    if not flag(fields, "use_sliding_window"):
        require_value(fields, "layer_types", None, ["full_attention"] * whole(fields, "num_hidden_layers"))
        return {}
    if fields.get("sliding_window", size) is None:
        require_value(fields, "layer_types", None, ["full_attention"] * whole(fields, "num_hidden_layers"))
        return {}
    first = number(fields, "max_window_layers", 28)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(whole(fields, "num_hidden_layers"))]
    return read_windows(fields, types, size)


def whole(fields: dict[str, Any], key: str, *default: Any) -> Any:
    """A whole number above 0; the default where it is missing or null. Without a default it must be there.

    Raises:
        UserError: it is missing, or something else.
    """
    value = fields.get(key)
    if value is None and default:
        return default[0]
    if key not in fields:
        raise MissingField(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {key} {value!r}; a whole number above 0 is wanted.")
    if value > MOST.get(key, LARGEST):
        raise UserError(f"config.json has {key} {value}. The largest supported value is {MOST.get(key, LARGEST)}.")
    return value


def number(fields: dict[str, Any], key: str, default: Any) -> Any:
    """A number; the default where it is missing or null. Raises `UserError` if it is something else."""
    value = fields.get(key)
    if value is None:
        return default
    if not is_number(value):
        raise UserError(f"config.json has {key} {value!r}; a number is wanted.")
    return float(value) if abs(value) >= 2**63 else value


def epsilon(fields: dict[str, Any], key: str, default: float) -> float:
    """What a norm adds to the variance; the default where it is missing. Raises `UserError` if it is no number."""
    value = number({key: default} | fields, key, None)
    if value is None:
        raise UserError(f"config.json has {key} null; a number is wanted.")
    return float(value)


def flag(fields: dict[str, Any], key: str, default: bool = False) -> bool:
    """True or false; the default where it is missing, false where it is null.

    Raises:
        UserError: it is something else.
    """
    value = fields.get(key, default) or False
    if not isinstance(value, bool):
        raise UserError(f"config.json has {key} {value!r}; true or false is wanted.")
    return value


def require_value(fields: dict[str, Any], key: str, *allowed: Any) -> None:
    """Refuse a field that is there with a value that changes the math to one that is not implemented."""
    if key in fields and fields[key] not in allowed:
        choices = " or ".join(repr(a) for a in allowed)
        raise UserError(f"config.json has {key} {fields[key]!r}; only {choices} is implemented.")
