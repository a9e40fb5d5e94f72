"""StableLM: Llama with LayerNorm and partial rotary embedding; in some, a norm for each head and parallel residuals."""

from litgpt.families.common import gate, only, rope, sizes
from litgpt.families.family import LAYER, Family
from litgpt.families.table import Rules
from litgpt.model.config import Config


def layer(config: Config) -> Rules:
    norms = {
        f"attn.norm_{x}": [f"self_attn.{x}_layernorm.norms.{i}" for i in range(heads)]
        for x, heads in (("q", config.n_head), ("k", config.n_query_groups))
    }
    return {**LAYER, **norms}


FAMILY = Family(
    "StableLmForCausalLM",
    [
        *sizes(kv_heads=32, always=False),
        only("head_dim", None),
        rope(partial=0.25),
        gate(),
        ("layer_norm_eps", "norm_eps", 1e-5),
        ("qk_layernorm", "norm_qk", False),
        ("use_parallel_residual", "parallel_residual shared_attention_norm", False),
        ("use_qkv_bias", "attn_bias", False),
    ],
    switches={"norm_class_name": "LayerNorm", "norm_qk_type": "each_head"},
    layer=layer,
)
