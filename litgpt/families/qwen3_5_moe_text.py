"""The text part of Qwen3.5 with a mixture of experts, and an expert for every token, in all layers
(https://qwen.ai/blog?id=qwen3.5)."""

from dataclasses import replace

from litgpt.families import qwen2_moe, qwen3_moe
from litgpt.families.common import only, sizes
from litgpt.families.family import QK_NORMS, Family, Field
from litgpt.families.qwen3_5_text import ALIASES, GATE, NET, NUMBERS, SWITCHES
from litgpt.families.table import Rules
from litgpt.model.config import Config

EXPERT = Field(
    "moe_intermediate_size",
    "intermediate_size moe_intermediate_size",
    512,
    lambda config: config.moe_intermediate_size or config.intermediate_size,
)


def layer(config: Config) -> Rules:
    return {**qwen2_moe.layer(config), **QK_NORMS, **NET}


FAMILY = Family(
    "Qwen3_5MoeForCausalLM",
    [
        *(row for row in sizes(kv_heads=2, head_dim=256) if row[0] != "intermediate_size"),
        *(row for row in NUMBERS if row is not GATE),
        only("hidden_act", "silu", "swish", written="silu"),
        EXPERT,
        ("shared_expert_intermediate_size", "shared_intermediate_size", 512, lambda config: config.shared_size),
        ("num_experts_per_tok", "n_expert_per_token", 8),
        qwen3_moe.experts(256),
    ],
    switches={**SWITCHES, "mlp_class_name": "LLaMAMoE", "n_shared_expert": 1, "shared_expert_gate": True},
    defaults={
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "max_position_embeddings": 32768,
    },
    layer=layer,
    aliases=replace(qwen3_moe.ALIASES, renames=ALIASES.renames, in_peft=False),
)
