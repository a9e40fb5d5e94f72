"""StableLM: Llama with LayerNorm and partial rotary embedding; in some, a norm for each head and parallel residuals."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_rope, read_sizes, require_value
from litgpt.families.llama import ENDS, LAYER
from litgpt.families.table import NameTable, in_layers
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "head_dim", None)
    parallel = flag(fields, "use_parallel_residual")
    return Config(
        **read_sizes(fields, kv_heads=32),
        **read_gate(fields),
        **read_rope(fields, partial=0.25),
        norm_class_name="LayerNorm",
        norm_eps=epsilon(fields, "layer_norm_eps", 1e-5),
        norm_qk=flag(fields, "qk_layernorm"),
        norm_qk_type="each_head",
        parallel_residual=parallel,
        shared_attention_norm=parallel,
        attn_bias=flag(fields, "use_qkv_bias"),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["StableLmForCausalLM"],
        **write_sizes(config, head_dim=False),
        **write_rope(config, partial=True),
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_eps,
        "qk_layernorm": config.norm_qk,
        "use_parallel_residual": config.parallel_residual,
        "use_qkv_bias": config.attn_bias,
    }


def name_table(config: Config) -> NameTable:
    assert config.n_query_groups is not None
    norms = {
        f"attn.norm_{x}": [f"self_attn.{x}_layernorm.norms.{i}" for i in range(heads)]
        for x, heads in (("q", config.n_head), ("k", config.n_query_groups))
    }
    return NameTable(ENDS | in_layers(config.n_layer, {**LAYER, **norms}))
