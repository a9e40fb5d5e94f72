"""OLMo 3: OLMo 2 with a window in three of four layers, and a scaled rope in the global ones alone."""

from typing import Any

from litgpt.families.common import read_sizes, read_two_ropes, read_windows, whole
from litgpt.families.olmo2 import name_table as name_table
from litgpt.families.olmo2 import read_shared, write_shared
from litgpt.families.writing import write_layer_types, write_scaling, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    n_layer = whole(fields, "num_hidden_layers")
    types = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(n_layer)]
    windows = read_windows(fields, types, size=4096)
    return Config(
        **read_sizes(fields),
        # transformers gives `rope_theta` to the global layers alone
        **read_two_ropes(fields, base=500000.0, local_base=500000.0, local_key=""),
        rope_indices=windows.get("sliding_window_indices", [0] * n_layer),
        **windows,
        **read_shared(fields),
    )


def write_config(config: Config) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    everywhere = {"rope_type": "default", **(write_scaling(config) or {}), "rope_theta": config.rope_base}
    return {
        "architectures": ["Olmo3ForCausalLM"],
        **write_sizes(config, head_dim=config.head_size != config.n_embd // config.n_head),
        **write_layer_types(config),
        **write_shared(config),
        "rope_parameters": {"full_attention": everywhere, "sliding_attention": local},
    }
