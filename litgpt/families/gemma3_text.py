"""Gemma 3 without vision: five local layers to a global one, each kind with its rope
(https://arxiv.org/abs/2503.19786)."""

from typing import Any

from litgpt.families.common import read_sizes, read_two_ropes, read_windows, require_value, whole
from litgpt.families.gemma import read_shared, write_shared
from litgpt.families.gemma2 import FOUR_NORMS, read_caps_and_norms, write_scalar
from litgpt.families.llama import ENDS, QK_NORMS
from litgpt.families.table import NameTable, in_layers
from litgpt.families.writing import write_layer_types, write_rope, write_sizes
from litgpt.model.config import Config

DEFAULTS = {  # of transformers; released files lean on them
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
}
LAYER = {**FOUR_NORMS, **QK_NORMS}


def read_config(fields: dict[str, Any]) -> Config:
    fields = DEFAULTS | fields
    require_value(fields, "attn_logit_softcapping", None)  # transformers has the field and does not use it
    every = whole(fields, "sliding_window_pattern", 6)
    n_layer = whole(fields, "num_hidden_layers")
    types = ["full_attention" if i % every == every - 1 else "sliding_attention" for i in range(n_layer)]
    windows = read_windows(fields, types, size=4096)
    return Config(
        **read_sizes(fields, kv_heads=4, head_dim=256),
        **read_two_ropes(fields, base=1000000.0, local_base=10000.0, local_key="rope_local_base_freq"),
        rope_indices=windows.get("sliding_window_indices", [0] * n_layer),
        norm_qk=True,
        **windows,
        **read_shared(fields),
        **read_caps_and_norms(fields),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        **write_layer_types(config),
        **write_shared(config),
        "rope_local_base_freq": config.rope_local_base_freq,
        "query_pre_attn_scalar": write_scalar(config),
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def name_table(config: Config) -> NameTable:
    return NameTable(ENDS | in_layers(config.n_layer, LAYER))
