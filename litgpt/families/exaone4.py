"""EXAONE 4: norms after attention and feed-forward, and of queries and keys per head. If there are windows, only the
layers that have one have a rope (https://arxiv.org/abs/2507.11407)."""

from typing import Any

from litgpt.families.common import gate, read_windows, rope, sizes, write_layer_types
from litgpt.families.family import Family, Part, integer
from litgpt.families.olmo2 import RULES, SWITCHES
from litgpt.model.config import Config


def read_layers(fields: dict[str, Any]) -> dict[str, Any]:
    fields, n_layer = {"sliding_window": 4096} | fields, integer(fields, "num_hidden_layers")
    if fields["sliding_window"] is None:
        return read_windows(fields, ["full_attention"] * n_layer)
    # its other form, text such as LLLG, comes with `layer_types`
    every = 4 if fields.get("layer_types") else integer(fields, "sliding_window_pattern", 4)
    types = ["full_attention" if i % every == every - 1 else "sliding_attention" for i in range(n_layer)]
    windows = read_windows(fields, types)
    return windows | {"rope_layers": windows.get("sliding_window_indices", [0] * n_layer)}


def write_layers(config: Config) -> dict[str, Any]:
    roped = all(config.rope_kind(i) == 0 for i in range(config.n_layer))
    local = any(config.window(i) for i in range(config.n_layer))
    size = config.sliding_window_size if local else None if roped else 4096
    return write_layer_types(config) | {"sliding_window": size, "sliding_window_pattern": None}


FAMILY = Family(
    "Exaone4ForCausalLM",
    [
        *sizes(kv_heads=32, always=False),
        rope(),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-5),
        Part(read_layers, write_layers),
    ],
    {**SWITCHES, "norm_qk_type": "default"},
    layer=RULES,
)
