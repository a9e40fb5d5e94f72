"""Llama: grouped-query attention, SwiGLU, RMSNorm, rotary embedding. Most families begin from here."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_rope, read_sizes
from litgpt.families.table import NameTable, Rules, in_layers
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config

ENDS = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
LAYER: Rules = {
    "norm_1": "input_layernorm",
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.proj": "mlp.down_proj",
}
QK_NORMS: Rules = {"attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"}


def read_config(fields: dict[str, Any]) -> Config:
    attention_bias = flag(fields, "attention_bias")
    return Config(
        **read_sizes(fields),
        **read_gate(fields),
        **read_rope(fields),
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-6),
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        mlp_bias=flag(fields, "mlp_bias"),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attn_bias,
        "mlp_bias": config.mlp_bias,
    }


def name_table(config: Config) -> NameTable:
    return NameTable(ENDS | in_layers(config.n_layer, LAYER))
