"""DeepSeek-V3 and R1: latent attention, and experts in groups (https://arxiv.org/abs/2412.19437)."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families import glm4_moe, qwen3_moe
from litgpt.families.common import (
    ATTENTION_BIAS,
    SIGMOID_EXPERTS,
    SIGMOID_ROUTER,
    only,
    read_dense_first,
    rope,
    sizes,
    write_dense_first,
)
from litgpt.families.family import Family, Part, Row, integer, mtp_layers
from litgpt.families.table import Rules
from litgpt.model.config import LATENT, Config
from litgpt.model.rope import yarn_scale

ROPE = rope()


def read_latent(fields: dict[str, Any]) -> dict[str, Any]:
    """The sizes of attention, and its rope. That raises the temperature of the scores, not only of what rotates."""
    latent = {name: integer(fields, name, *([None] if name == "q_lora_rank" else [])) for name in LATENT}
    rotating, size = latent["qk_rope_head_dim"], latent["qk_rope_head_dim"] + latent["qk_nope_head_dim"]
    if fields.get("head_dim", rotating) != rotating:  # from which transformers would compute the rope
        raise UserError(f"config.json has head_dim {fields['head_dim']!r}, but qk_rope_head_dim {rotating}.")
    found = ROPE.read(fields)
    all_dim, factor = (found["rope_adjustments"].get(name) for name in ("mscale_all_dim", "factor"))
    if all_dim:
        found["attention_scores_scalar"] = size / yarn_scale(factor, all_dim) ** 4
    return found | {"latent_attention": latent, "latent_norm_eps": 1e-6, "head_size": size}


def write_latent(config: Config) -> dict[str, Any]:
    latent = config.latent_attention or {}
    return {**latent, "head_dim": latent.get("qk_rope_head_dim"), **ROPE.write(config)}


def layer(config: Config) -> Rules:
    rules = {ours: hf for ours, hf in glm4_moe.layer(config).items() if ours != "attn.qkv"}
    for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
        rules[f"attn.{name}"] = f"self_attn.{name}"
    return rules | {"attn.q_a_norm": "self_attn.q_a_layernorm", "attn.kv_a_norm": "self_attn.kv_a_layernorm"}


ROWS: list[Row] = [  # of all but the layers that have experts
    *sizes(),
    Part(read_latent, write_latent),
    ("rope_interleave", "rope_interleave", True),
    only("hidden_act", "silu", "swish", written="silu"),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ATTENTION_BIAS,
    *SIGMOID_EXPERTS,
]
FAMILY = Family(
    "DeepseekV3ForCausalLM",
    [*ROWS, Part(read_dense_first, write_dense_first)],
    switches=SIGMOID_ROUTER,
    defaults={
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
    },
    layer=layer,
    kept=mtp_layers,
    aliases=qwen3_moe.FAMILY.aliases,
)
