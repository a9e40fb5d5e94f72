"""Qwen2 and Qwen2.5: Llama with biases in q, k and v, and windows in the later layers where they are switched on."""

from litgpt.families.common import gate, late_windows, rope, sizes
from litgpt.families.family import Family

FAMILY = Family(
    "Qwen2ForCausalLM",
    [*sizes(kv_heads=32, always=False), rope(), late_windows(), gate(), ("rms_norm_eps", "norm_eps", 1e-6)],
    switches={"attn_bias": True},
)
