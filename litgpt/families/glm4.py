"""GLM-4-0414: four norms a block, a rope of neighbors on half of each head, and fused weights."""

from litgpt.families.common import gate, rope, sizes
from litgpt.families.family import LAYER, Family

FAMILY = Family(
    "Glm4ForCausalLM",
    [
        *sizes(kv_heads=2, head_dim=128),
        rope(partial=0.5),
        gate(),
        ("rms_norm_eps", "norm_eps", 1.5625e-7),
        ("attention_bias", "attn_bias", True),
    ],
    switches={"rope_interleave": True, "post_attention_norm": True, "post_mlp_norm": True},
    layer={
        **LAYER,
        "post_attention_norm": "post_self_attn_layernorm",
        "norm_2": "post_attention_layernorm",
        "mlp.fc": "mlp.gate_up_proj",
        "post_mlp_norm": "post_mlp_layernorm",
    },
)
