"""GLM-4.5, 4.6 and 4.7: a sigmoid router with a bias, a shared expert, partial rope (https://arxiv.org/abs/2508.06471)."""

from litgpt.families import qwen3_moe
from litgpt.families.common import (
    SIGMOID_EXPERTS,
    SIGMOID_ROUTER,
    only,
    read_dense_first,
    rope,
    sizes,
    write_dense_first,
)
from litgpt.families.family import Family, Part, mtp_layers
from litgpt.families.table import Rules
from litgpt.model.config import Config


def layer(config: Config) -> Rules:
    return {
        **qwen3_moe.layer(config),
        "mlp.gate.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        "mlp.shared_experts.fc": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
        "mlp.shared_experts.proj": "mlp.shared_experts.down_proj",
    }


FAMILY = Family(
    "Glm4MoeForCausalLM",
    [
        *sizes(kv_heads=8),
        rope(partial=0.5),
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-5),
        ("attention_bias", "attn_bias", False),
        ("use_qk_norm", "norm_qk", False),
        *SIGMOID_EXPERTS,
        Part(read_dense_first, write_dense_first),
    ],
    switches=SIGMOID_ROUTER,
    defaults={
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    layer=layer,
    kept=mtp_layers,
    aliases=qwen3_moe.FAMILY.aliases,
)
