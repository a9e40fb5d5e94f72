"""OLMo: Llama with LayerNorms that have no weights (https://arxiv.org/abs/2402.00838)."""

from typing import Any

from litgpt.families.common import flag, number, read_gate, read_rope, read_sizes
from litgpt.families.llama import name_table as name_table
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    attention_bias = flag(fields, "attention_bias")
    return Config(
        **read_sizes(fields),
        **read_gate(fields),
        **read_rope(fields),
        norm_class_name="LayerNorm",
        norm_affine=False,
        norm_eps=1e-5,
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        clip_qkv=number(fields, "clip_qkv", None),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["OlmoForCausalLM"],
        **write_sizes(config, head_dim=config.head_size != config.n_embd // config.n_head),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "attention_bias": config.attn_bias,
        "clip_qkv": config.clip_qkv,
    }
