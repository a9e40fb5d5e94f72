"""Mistral: Llama with a sliding window in every layer (https://arxiv.org/abs/2310.06825)."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_rope, read_sizes, require_value, whole
from litgpt.families.llama import name_table as name_table
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any], window: Any = 4096) -> Config:
    require_value(fields, "layer_types", None)
    return Config(
        **read_sizes(fields, kv_heads=8),
        **read_gate(fields),
        **read_rope(fields),
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-6),
        sliding_window_size=whole({"sliding_window": window} | fields, "sliding_window", None),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.window(0),
    }
