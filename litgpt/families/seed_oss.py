"""Seed-OSS: Llama with biases in q, k and v, and a bias after attention that is switched on by itself."""

from litgpt.families.common import gate, rope, sizes
from litgpt.families.family import Family

FAMILY = Family(
    "SeedOssForCausalLM",
    [
        *sizes(kv_heads=8, head_dim=128),
        rope(),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ("attention_bias", "attn_bias", True),
        ("attention_out_bias", "attn_proj_bias", False),
        ("mlp_bias", "mlp_bias", False),
    ],
)
