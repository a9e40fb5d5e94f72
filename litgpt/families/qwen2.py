"""Qwen2 and Qwen2.5: Llama with biases in q, k and v, and windows in the later layers where they are switched on."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_late_windows, read_rope, read_sizes
from litgpt.families.llama import name_table as name_table
from litgpt.families.writing import write_activation, write_late_windows, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    return Config(
        **read_sizes(fields, kv_heads=32),
        **read_gate(fields),
        **read_rope(fields),
        **read_late_windows(fields),
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-6),
        attn_bias=True,
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        **write_sizes(config, head_dim=config.head_size != config.n_embd // config.n_head),
        **write_rope(config),
        **write_late_windows(config),
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
    }
