"""Fields of `config.json` that several families share, as rows and parts of a `Family`.

A default is the one of `transformers`, which differs between families. Dropout rates are not read, because pretrained
weights run without dropout.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.families.family import REQUIRED, Field, Part, Row, count, flag, integer, number, require_value
from litgpt.model.config import Config
from litgpt.model.rope import ROPE_TYPES
from litgpt.storage.fields import is_number

LENGTH = "original_max_position_embeddings"
# required positive numbers, and other known ones; an unknown one could mean something that is not implemented
ROPE_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", LENGTH), ()),
    "yarn": (
        ("factor", LENGTH),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        (LENGTH,),  # the last two of the others are in early Phi-3 files; transformers ignores them
        ("factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"),
    ),
    "proportional": ((), ("factor", "partial_rotary_factor")),
}
WHOLE_ROPES = [name for name in ROPE_TYPES if name != "proportional"]  # of all pairs that a config rotates
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
ATTENTION_BIAS: Row = ("attention_bias", "attn_bias attn_proj_bias", False)


def only(key: str, *allowed: Any, written: Any = None) -> Part:
    """Refuses other values of a field than these. Writes `written`, unless it is None."""

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        require_value(fields, key, *allowed)
        return {}

    return Part(read, lambda config: {} if written is None else {key: written})


def sizes(
    kv_heads: Optional[int] = None, head_dim: Optional[int] = None, tied: bool = False, always: bool = True
) -> list[Row]:
    """The sizes, under the names that most families use, and whether the head is the embedding.

    Args:
        kv_heads: The default of `num_key_value_heads`; None for as many as heads.
        head_dim: The default of `head_dim`; None for the width divided by the number of heads.
        always: Whether to write `head_dim` even if it is the default.
    """
    head = Field("head_dim", "head_size", head_dim)

    def write_head(config: Config) -> dict[str, Any]:
        return head.write(config) if always or config.head_size != config.n_embd // config.n_head else {}

    return [
        ("vocab_size", "padded_vocab_size"),
        ("hidden_size", "n_embd"),
        ("intermediate_size", "intermediate_size"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("num_key_value_heads", "n_query_groups", kv_heads),
        Part(head.read, write_head),
        ("max_position_embeddings", "block_size"),
        ("tie_word_embeddings", "tie_embeddings", tied),
    ]


def whole_heads(width: str, heads: str) -> Part:

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        if integer(fields, width) % integer(fields, heads):
            raise UserError(
                f"config.json has {width} {fields[width]}, which is not a multiple of {fields[heads]} heads."
            )
        return {}

    return Part(read)


def gate(key: str = "hidden_act", default: str = "silu") -> Part:

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get(key, default) in ("silu", "swish"):
            return {"mlp_class_name": "LLaMAMLP"}
        return {"mlp_class_name": "GemmaMLP", "gelu_approximate": read_gelu(fields, key, default, "silu")}

    return Part(read, lambda config: {key: write_activation(config)})


def gelu(key: str, default: str, tanh: str = "gelu_pytorch_tanh") -> Part:
    """The activation of a feed-forward part without a gate. `tanh` is the name to write for its approximation."""

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        others = ("relu2", "xielu") if default == "xielu" else ("relu2",)  # whose weights no other family has names for
        if fields.get(key, default) in others:
            return {"mlp_class_name": "GptNeoxMLP", "activation": fields.get(key, default)}
        return {"mlp_class_name": "GptNeoxMLP", "gelu_approximate": read_gelu(fields, key, default, *others)}

    return Part(read, lambda config: {key: write_activation(config, tanh)})


def read_gelu(fields: dict[str, Any], key: str, default: str, *others: str) -> str:
    name = fields.get(key, default)
    if not isinstance(name, str) or name not in GELUS:
        choices = ", ".join((*others, *GELUS))
        raise UserError(f"config.json has {key} {name!r}, which is not implemented. Supported: {choices}.")
    return GELUS[name]


def write_activation(config: Config, tanh: str = "gelu_pytorch_tanh") -> str:
    if config.mlp_class_name in ("LLaMAMLP", "LLaMAMoE") and config.expert_activation == "silu":
        return "silu"
    if config.mlp_class_name == "GptNeoxMLP" and config.activation != "gelu":
        return config.activation
    return "gelu" if config.gelu_approximate == "none" else tanh


def read_dense_first(fields: dict[str, Any]) -> dict[str, Any]:
    first = count(fields, "first_k_dense_replace")
    return {"moe_layers": [int(i >= first) for i in range(integer(fields, "num_hidden_layers"))]}


def write_dense_first(config: Config) -> dict[str, Any]:
    return {"first_k_dense_replace": [*map(config.mlp_class, range(config.n_layer)), "LLaMAMoE"].index("LLaMAMoE")}


SIGMOID_EXPERTS: list[Row] = [  # of DeepSeek-V3 and those that follow it; their defaults are those of each family
    ("n_routed_experts", "n_expert"),
    ("num_experts_per_tok", "n_expert_per_token"),
    (
        "moe_intermediate_size",
        "moe_intermediate_size",
        REQUIRED,
        lambda c: c.moe_intermediate_size or c.intermediate_size,
    ),
    ("n_shared_experts", "n_shared_expert"),
    ("n_group", "n_expert_groups"),
    ("topk_group", "n_topk_groups"),
    ("norm_topk_prob", "norm_topk_prob", True),
    ("routed_scaling_factor", "routed_scaling_factor", 1.0),
]
SIGMOID_ROUTER = {"mlp_class_name": "LLaMAMoE", "router_scores": "sigmoid", "router_bias": True}  # switches


def rope(
    base: float = 10000.0,
    partial: Optional[float] = None,
    base_key: str = "rope_theta",
    partial_key: str = "partial_rotary_factor",
    types: Sequence[str] = WHOLE_ROPES,
) -> Part:
    """The rotary embedding, in `rope_parameters` or in the older `rope_theta` and `rope_scaling`.

    Args:
        base: The default of the base.
        partial: The default of the share of a head that rotates; None in families where all of it does.
    """

    def write(config: Config) -> dict[str, Any]:
        written = {base_key: config.rope_base, "rope_scaling": write_scaling(config)}
        return written | ({} if partial is None else {partial_key: config.rotary_percentage})

    return Part(lambda fields: read_rope(fields, base, partial, base_key, partial_key, types), write)


def rope_of_text(base: float, partial: Optional[float] = None) -> Part:
    """Qwen's rope with positions in time, height and width, which are all the same where there is text alone."""
    plain = rope(base, partial)

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        key, numbers = rope_numbers(fields)
        numbers = {k: v for k, v in numbers.items() if k not in ("mrope_section", "mrope_interleaved")}
        named = {k: "default" for k in ("type", "rope_type") if numbers.get(k) == "mrope"}
        return plain.read(fields | {key: numbers | named})

    return Part(read, plain.write)


def read_rope(
    fields: dict[str, Any], base: float, partial: Optional[float], base_key: str, partial_key: str, types: Sequence[str]
) -> dict[str, Any]:
    """Arguments as in `rope`. Raises `UserError` for an unknown type, and for missing or unknown numbers."""
    key, numbers = rope_numbers(fields)
    rope_type = numbers.pop("type", None)
    rope_type = numbers.pop("rope_type", None) or rope_type or "default"
    if not isinstance(rope_type, str) or rope_type not in types:
        raise UserError(f"config.json has {key} of type {rope_type!r}. Supported: {', '.join(types)}.")
    complete_numbers(fields, numbers, key, rope_type)
    beside = number({partial_key: partial} | fields, partial_key, 1.0)  # null: all of it
    share = float(number(numbers, "partial_rotary_factor", beside))
    known = [name for names in ROPE_NUMBERS[rope_type] for name in names]
    if not 0 < share <= 1 or (partial is None and share != 1 and "partial_rotary_factor" not in known):
        raise UserError(f"config.json has {partial_key} {share:g}, which is not implemented for this family.")
    theta = number(numbers, "rope_theta", number(fields, base_key, base))
    elsewhere = {"partial_rotary_factor", "rope_theta"}.difference(known)
    numbers = {name: v for name, v in numbers.items() if name not in elsewhere}
    if unknown := sorted(name for name, value in numbers.items() if value is not None and name not in known):
        raise UserError(f"config.json has {', '.join(unknown)} in {key} of type {rope_type!r}, which is unknown.")
    for name, value in numbers.items():
        if not isinstance(value, (bool, list)):
            number(numbers, name, None)
    return {
        "rope_base": float(theta),
        "rope_type": rope_type,
        "rope_adjustments": {name: value for name, value in numbers.items() if name in known},
        **({"rotary_percentage": share} if partial is not None else {}),
    }


def rope_numbers(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The field that describes the rope, and a copy of its object."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    return key, as_object(fields.get(key), key)


def as_object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise UserError(f"config.json has {key} {value!r}. Expected an object.")
    return dict(value or {})


def complete_numbers(fields: dict[str, Any], numbers: dict[str, Any], key: str, rope_type: str) -> None:
    """Add the numbers of a rope that other fields give. Raises `UserError` if one is missing or unusable."""
    required, _ = ROPE_NUMBERS[rope_type]
    if LENGTH in required:
        if fields.get(LENGTH) is not None:  # beside the rope it overrides the rope's own
            numbers[LENGTH] = fields[LENGTH]
        numbers.setdefault(LENGTH, fields.get("max_position_embeddings"))
        if rope_type == "longrope" or numbers.get("factor", 0) is None:
            ratio = integer(fields, "max_position_embeddings") / integer(numbers, LENGTH)
            numbers["factor"] = number(numbers, "factor", ratio)
    missing = [name for name in required if not is_positive(numbers.get(name))]
    for name in ("short_factor", "long_factor") if rope_type == "longrope" else ():
        values = numbers.get(name)
        missing += [] if isinstance(values, list) and all(map(is_positive, values)) else [name]
    if missing:
        raise UserError(f"config.json has {key} of type {rope_type!r} without usable {', '.join(missing)}.")


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def write_scaling(config: Config) -> Optional[dict[str, Any]]:
    return None if config.rope_type == "default" else {"rope_type": config.rope_type, **config.rope_adjustments}


def whole_rope(config: Config) -> dict[str, Any]:
    """`rope_parameters`, for families where it has another default than a rope of the default type."""
    return {"rope_type": "default", **(write_scaling(config) or {}), "rope_theta": config.rope_base}


def read_two_ropes(
    fields: dict[str, Any], base: float, local_base: float, local_key: str = "", **options: Any
) -> dict[str, Any]:
    """One rope for global layers, and one of the default type for local layers. Newer files have an object for each in
    `rope_parameters`. In older ones `rope_theta` and `rope_scaling` describe the global layers. `options` are for
    `rope`."""
    both = as_object(fields.get("rope_parameters"), "rope_parameters")
    beside = {"truncate": both.pop("truncate")} if "truncate" in both else {}  # where transformers looks for it
    unknown = {key for key, value in both.items() if value is not None} - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"config.json has {', '.join(sorted(unknown))} beside the layer types in rope_parameters.")
    everywhere = as_object(both.get("full_attention"), "rope_parameters.full_attention")
    local = as_object(both.get("sliding_attention"), "rope_parameters.sliding_attention")
    if local.get("rope_type", local.get("type", "default")) != "default":
        raise UserError("config.json has a type other than 'default' in rope_parameters.sliding_attention.")
    if everywhere.pop("truncate", True) not in (True, None):
        raise UserError("config.json has truncate in rope_parameters.full_attention, where transformers ignores it.")
    everywhere |= beside | as_object(fields.get("rope_scaling"), "rope_scaling")
    flat = {k: v for k, v in fields.items() if k != "rope_scaling"} | {"rope_parameters": everywhere}
    local_base = float(number(local, "rope_theta", number(fields, local_key, local_base) if local_key else local_base))
    return rope(base, **options).read(flat) | {"rope_local_base_freq": local_base}


def hybrid_layers(recurrent: str, default: Callable[[dict[str, Any], int], list[str]]) -> Part:
    """Which layers are recurrent, from `layer_types`, where they have this name.

    Args:
        default: The types, from the fields and the number of layers, where the field is missing.
    """
    kinds = ("full_attention", recurrent)

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        n_layer, types = integer(fields, "num_hidden_layers"), fields.get("layer_types")
        if types is None:
            types = default(fields, n_layer)
        if not isinstance(types, list) or len(types) != n_layer or not all(kind in kinds for kind in types):
            raise UserError(f"config.json has layer_types {types!r}. Expected {' or '.join(kinds)} for each layer.")
        return {"recurrent_layers": list(map(kinds.index, types))} if recurrent in types else {}

    return Part(read, lambda c: {"layer_types": [kinds[c.is_recurrent(layer)] for layer in range(c.n_layer)]})


WINDOW: Row = ("sliding_window", "sliding_window_size", None, lambda config: config.window(0))  # of all layers


def windows(every: int, key: str = "", two_ropes: bool = False) -> Part:
    """Sliding windows in all layers but one of every few, or in those that `layer_types` lists.

    Args:
        every: The last of this many layers is global.
        key: The field that overrides `every`, if there is one.
        two_ropes: Whether layers with a window have a rope of their own.
    """

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        n_layer, period = integer(fields, "num_hidden_layers"), integer(fields, key, every) if key else every
        types = ["full_attention" if i % period == period - 1 else "sliding_attention" for i in range(n_layer)]
        found = read_windows(fields, types, size=4096)
        return found | ({"rope_indices": found.get("sliding_window_indices", [0] * n_layer)} if two_ropes else {})

    return Part(read, write_layer_types)


def late_windows(early: bool = False) -> Part:
    """Qwen's sliding windows: off unless `use_sliding_window` is set, then from layer `max_window_layers` on; with
    `early` in every second layer before it."""

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        n_layer = integer(fields, "num_hidden_layers")
        if not flag(fields, "use_sliding_window") or fields.get("sliding_window", 4096) is None:
            require_value(fields, "layer_types", None, ["full_attention"] * n_layer)
            return {}
        first = number(fields, "max_window_layers", 28)
        local = [i < first and i % 2 == 0 if early else i >= first for i in range(n_layer)]
        types = ["sliding_attention" if is_local else "full_attention" for is_local in local]
        return read_windows(fields, types, size=4096)

    def write(config: Config) -> dict[str, Any]:
        fields = write_layer_types(config)
        if "sliding_window" not in fields:
            return {"use_sliding_window": False}
        n_global = fields["layer_types"].count("full_attention")
        return fields | {"use_sliding_window": True, "max_window_layers": n_global}

    return Part(read, write)


def read_windows(fields: dict[str, Any], default: Sequence[str], size: Any = None) -> dict[str, Any]:
    """The sliding windows, from `layer_types`, or `default`, and from `sliding_window`, or `size`. Raises `UserError`
    for another type of layer, and for local layers without a window."""
    types, n_layer = fields.get("layer_types") or list(default), integer(fields, "num_hidden_layers")
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or not all(t in known for t in types):
        raise UserError(f"config.json has layer_types {types!r}. Expected a list of {' and '.join(known)}.")
    if len(types) != n_layer:
        raise UserError(f"config.json has {len(types)} layer_types for {n_layer} layers.")
    local = [int(t == "sliding_attention") for t in types]
    if not any(local):
        return {}
    return {
        "sliding_window_size": integer({"sliding_window": size} | fields, "sliding_window"),
        "sliding_window_indices": local,
    }


def write_layer_types(config: Config) -> dict[str, Any]:
    """`layer_types`, and `sliding_window` if a layer has a window."""
    local = [config.window(i) is not None for i in range(config.n_layer)]
    types = ["sliding_attention" if is_local else "full_attention" for is_local in local]
    return ({"sliding_window": config.sliding_window_size} if any(local) else {}) | {"layer_types": types}
