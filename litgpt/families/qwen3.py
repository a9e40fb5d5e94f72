"""Qwen3: Llama with norms of queries and keys (https://arxiv.org/abs/2505.09388)."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_late_windows, read_rope, read_sizes
from litgpt.families.llama import ENDS, LAYER, QK_NORMS
from litgpt.families.table import NameTable, in_layers
from litgpt.families.writing import write_activation, write_late_windows, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    attention_bias = flag(fields, "attention_bias")
    return Config(
        **read_sizes(fields, kv_heads=32, head_dim=128),
        **read_gate(fields),
        **read_rope(fields),
        **read_late_windows(fields),
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-6),
        norm_qk=True,
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        **write_late_windows(config),
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attn_bias,
    }


def name_table(config: Config) -> NameTable:
    return NameTable(ENDS | in_layers(config.n_layer, {**LAYER, **QK_NORMS}))
