"""Gemma: GeGLU, norms that scale by 1 + weight, embeddings scaled by the root of the width
(https://arxiv.org/abs/2403.08295)."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_rope, read_sizes, require_value
from litgpt.families.llama import name_table as name_table
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "use_bidirectional_attention", None, False)
    require_value(fields, "hidden_activation", None, "gelu_pytorch_tanh")
    if fields.get("hidden_act") == "gelu":  # in the first files; the tanh was meant
        fields = fields | {"hidden_act": "gelu_pytorch_tanh"}
    return Config(
        **read_sizes(fields, kv_heads=16, head_dim=256),
        **read_gate(fields, default="gelu_pytorch_tanh"),
        **read_rope(fields),
        **read_shared(fields),
    )


def read_shared(fields: dict[str, Any]) -> dict[str, Any]:
    """What all generations of Gemma have in common."""
    attention_bias = flag(fields, "attention_bias")
    return {
        "norm_eps": epsilon(fields, "rms_norm_eps", 1e-6),
        "norm_unit_offset": True,
        "scale_embeddings": True,
        "attn_bias": attention_bias,
        "attn_proj_bias": attention_bias,
        "tie_embeddings": flag(fields, "tie_word_embeddings", True),
    }


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["GemmaForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        **write_shared(config),
        "hidden_act": write_activation(config),
    }


def write_shared(config: Config) -> dict[str, Any]:
    return {
        "hidden_activation": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attn_bias,
    }
