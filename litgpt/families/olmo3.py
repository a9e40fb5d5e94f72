"""OLMo 3: OLMo 2 with a window in three of four layers, and a scaled rope in the global ones alone."""

from typing import Any

from litgpt.config import Config
from litgpt.families.common import read_sizes, read_two_ropes, read_windows
from litgpt.families.olmo2 import name_table as name_table
from litgpt.families.olmo2 import read_shared


def read_config(fields: dict[str, Any]) -> Config:
    n_layer = fields["num_hidden_layers"]
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
