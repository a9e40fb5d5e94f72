"""OLMoE: OLMo with norms before attention and feed-forward, norms of queries and keys over all heads, and a mixture of
experts in every layer (https://arxiv.org/abs/2409.02060)."""

from litgpt.families import mixtral, qwen3_moe
from litgpt.families.common import ATTENTION_BIAS, only, rope, sizes
from litgpt.families.family import Family

FAMILY = Family(
    "OlmoeForCausalLM",
    [
        *sizes(always=False),
        only("head_dim", None),
        mixtral.INTERMEDIATE,
        rope(),
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-5),
        ATTENTION_BIAS,
        ("clip_qkv", "clip_qkv", None),
        qwen3_moe.experts(64),
        ("num_experts_per_tok", "n_expert_per_token", 8),
        ("norm_topk_prob", "norm_topk_prob", False),
    ],
    switches={"mlp_class_name": "LLaMAMoE", "norm_qk": True, "norm_qk_type": "olmo2"},
    layer=qwen3_moe.layer,
    aliases=qwen3_moe.ALIASES,
)
