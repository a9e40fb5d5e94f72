"""ERNIE 4.5, its models without experts: Llama with a rope of neighbors."""

from litgpt.families.common import gate, rope, sizes
from litgpt.families.family import Family

FAMILY = Family(
    "Ernie4_5ForCausalLM",
    [
        *sizes(kv_heads=2, head_dim=128, tied=True),
        rope(base=500000.0),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-5),
        ("use_bias", "attn_bias attn_proj_bias mlp_bias", False),
    ],
    switches={"rope_interleave": True},
)
