"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture of experts, and an expert for every token, in most layers
(https://arxiv.org/abs/2407.10671)."""

from dataclasses import replace

from litgpt.families import qwen3_moe
from litgpt.families.common import late_windows, only, rope, sizes
from litgpt.families.family import Family
from litgpt.families.table import Rules
from litgpt.model.config import Config


def layer(config: Config) -> Rules:
    shared = "mlp.shared_expert."
    return {
        **qwen3_moe.layer(config),
        "mlp.shared_experts.fc": [shared + "gate_proj", shared + "up_proj"],
        "mlp.shared_experts.proj": shared + "down_proj",
        "mlp.shared_expert_gate": "mlp.shared_expert_gate",
    }


FAMILY = Family(
    "Qwen2MoeForCausalLM",
    [
        *sizes(kv_heads=16, always=False),
        rope(),
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ("qkv_bias", "attn_bias", True),
        qwen3_moe.experts(60),
        ("num_experts_per_tok", "n_expert_per_token", 4),
        *qwen3_moe.expert_rows(1408),
        ("shared_expert_intermediate_size", "shared_intermediate_size", 5632, lambda config: config.shared_size),
        late_windows(early=True),
    ],
    switches={"mlp_class_name": "LLaMAMoE", "n_shared_expert": 1, "shared_expert_gate": True},
    layer=layer,
    aliases=replace(qwen3_moe.ALIASES, in_peft=False),
)
