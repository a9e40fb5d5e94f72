"""Llama: grouped-query attention, SwiGLU, RMSNorm, rotary embedding."""

from typing import Any

from litgpt.config import Config
from litgpt.families.common import read_rope, require_value
from litgpt.families.table import NameTable, in_layers

RULES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    **in_layers(
        {
            "norm_1": "input_layernorm",
            "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.proj": "self_attn.o_proj",
            "norm_2": "post_attention_layernorm",
            "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.proj": "mlp.down_proj",
        },
        hf_layer="model.layers.{}.",
    ),
}


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "hidden_act", "silu")
    attention_bias = bool(fields.get("attention_bias", False))
    return Config(
        block_size=fields["max_position_embeddings"],
        padded_vocab_size=fields["vocab_size"],
        n_layer=fields["num_hidden_layers"],
        n_embd=fields["hidden_size"],
        n_head=fields["num_attention_heads"],
        n_query_groups=fields.get("num_key_value_heads"),
        head_size=fields.get("head_dim"),
        intermediate_size=fields["intermediate_size"],
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        **read_rope(fields),
    )


def name_table(config: Config) -> NameTable:
    return NameTable(RULES)
