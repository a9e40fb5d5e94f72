"""Llama: grouped-query attention, SwiGLU, RMSNorm, rotary embedding."""

from typing import Any

from litgpt.config import Config
from litgpt.families.common import flag, read_rope, require_value, whole
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
    attention_bias = flag(fields, "attention_bias")
    return Config(
        block_size=whole(fields, "max_position_embeddings"),
        padded_vocab_size=whole(fields, "vocab_size"),
        n_layer=whole(fields, "num_hidden_layers"),
        n_embd=whole(fields, "hidden_size"),
        n_head=whole(fields, "num_attention_heads"),
        n_query_groups=whole(fields, "num_key_value_heads", None),
        head_size=whole(fields, "head_dim", None),
        intermediate_size=whole(fields, "intermediate_size"),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        mlp_bias=flag(fields, "mlp_bias"),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
        **read_rope(fields),
    )


def name_table(config: Config) -> NameTable:
    return NameTable(RULES)
