"""Qwen3: Llama with norms of queries and keys (https://arxiv.org/abs/2505.09388)."""

from litgpt.families.common import ATTENTION_BIAS, gate, late_windows, rope, sizes
from litgpt.families.family import LAYER, QK_NORMS, Family

FAMILY = Family(
    "Qwen3ForCausalLM",
    [
        *sizes(kv_heads=32, head_dim=128),
        rope(),
        late_windows(),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ATTENTION_BIAS,
    ],
    switches={"norm_qk": True},
    layer={**LAYER, **QK_NORMS},
)
