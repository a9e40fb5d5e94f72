"""Phi-1, 1.5 and 2: parallel residuals on one LayerNorm, biases everywhere, partial rotary embedding
(https://arxiv.org/abs/2309.05463)."""

from typing import Any

from litgpt.families.common import epsilon, flag, gelu, read_rope, read_sizes
from litgpt.families.table import NameTable, in_layers
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config

LAYER = {
    "norm_1": "input_layernorm",
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.norm_q": "self_attn.q_layernorm",
    "attn.norm_k": "self_attn.k_layernorm",
    "attn.proj": "self_attn.dense",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}


def read_config(fields: dict[str, Any]) -> Config:
    return Config(
        **read_sizes(fields),
        **read_rope(fields, partial=0.5),
        norm_class_name="LayerNorm",
        norm_eps=epsilon(fields, "layer_norm_eps", 1e-5),
        norm_qk=flag(fields, "qk_layernorm"),
        parallel_residual=True,
        shared_attention_norm=True,
        bias=True,
        lm_head_bias=True,
        mlp_class_name="GptNeoxMLP",
        gelu_approximate=gelu(fields, "hidden_act", "gelu_new"),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["PhiForCausalLM"],
        **write_sizes(config, head_dim=False),
        **write_rope(config, partial=True),
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_eps,
        "qk_layernorm": config.norm_qk,
    }


def name_table(config: Config) -> NameTable:
    ends = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.final_layernorm", "lm_head": "lm_head"}
    return NameTable(ends | in_layers(config.n_layer, LAYER))
