"""SmolLM3: Llama with layers that have no rope."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import read_windows, rope, sizes, write_layer_types
from litgpt.families.family import Family, Part, flag, integer, require_value
from litgpt.families.llama import BLOCK
from litgpt.model.config import Config


def read_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """The layers with a rope, which `no_rope_layers` marks with 1 despite its name, and those with a window."""
    n_layer, every = integer(fields, "num_hidden_layers"), integer(fields, "no_rope_layer_interval", 4)
    roped = fields.get("no_rope_layers")
    if roped is None:
        roped = [int((i + 1) % every != 0) for i in range(n_layer)]
    if not isinstance(roped, list) or len(roped) < n_layer or not all(r in (0, 1) for r in roped):
        raise UserError(f"config.json has no_rope_layers {roped!r}. Expected 0 or 1 for each of {n_layer} layers.")
    roped = [int(r) for r in roped[:n_layer]]
    if flag(fields, "use_sliding_window") and fields.get("sliding_window") is not None:
        windows = read_windows(fields, ["full_attention" if r else "sliding_attention" for r in roped])
        return windows | {"rope_layers": roped}
    require_value(fields, "layer_types", None, ["full_attention"] * n_layer)
    return {"rope_layers": roped}


def write_layers(config: Config) -> dict[str, Any]:
    return write_layer_types(config) | {
        "use_sliding_window": any(config.window(i) for i in range(config.n_layer)),
        "no_rope_layers": [int(config.rope_kind(i) is not None) for i in range(config.n_layer)],
    }


FAMILY = Family(
    "SmolLM3ForCausalLM",
    [*sizes(kv_heads=4, tied=True, always=False), rope(base=2000000.0), Part(read_layers, write_layers), *BLOCK],
)
