"""MiniMax-M2: a sigmoid router with a bias, norms of queries and keys over all heads, partial rope
(https://huggingface.co/MiniMaxAI/MiniMax-M2)."""

from typing import Any

from litgpt.families import mixtral
from litgpt.families.common import SIGMOID_ROUTER, only, rope, sizes
from litgpt.families.family import QK_NORMS, Family, Part, integer, number
from litgpt.families.table import Rules
from litgpt.model.config import Config

ROPE = rope(base=5000000.0, partial=1.0)


def read_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """The share of a head that rotates may be given as a number of dimensions."""
    size = integer(fields, "head_dim", 128)
    return ROPE.read({"partial_rotary_factor": number(fields, "rotary_dim", size) / size, **fields})


def layer(config: Config) -> Rules:
    bias = {"mlp.gate.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias"}
    return {**mixtral.layer(config), **QK_NORMS, **bias}


FAMILY = Family(
    "MiniMaxM2ForCausalLM",
    [
        *sizes(kv_heads=8, head_dim=128),
        Part(read_rope, ROPE.write),
        mixtral.INTERMEDIATE,
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ("num_local_experts", "n_expert", 256),
        ("num_experts_per_tok", "n_expert_per_token", 8),
        only("router_jitter_noise", 0),
    ],
    switches={**SIGMOID_ROUTER, "norm_qk": True, "norm_qk_type": "olmo2"},
    layer=layer,
    aliases=mixtral.FAMILY.aliases,
)
