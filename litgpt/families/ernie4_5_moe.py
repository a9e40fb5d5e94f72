"""ERNIE 4.5 with experts: softmax scores, a bias for the choice alone, shared experts, a rope of neighbors
(https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf)."""

from dataclasses import replace
from typing import Any

from litgpt.families import glm4_moe, qwen3_moe
from litgpt.families.common import only, rope, sizes
from litgpt.families.family import MTP, Family, Part, count, integer
from litgpt.families.table import Rules, Stored
from litgpt.model.config import Config


def read_moe_layers(fields: dict[str, Any]) -> dict[str, Any]:
    n_layer, step = integer(fields, "num_hidden_layers"), integer(fields, "moe_layer_interval", 1)
    first = count(fields, "moe_layer_start_index", 1)
    last = n_layer - 1 if fields.get("moe_layer_end_index", -1) == -1 else count(fields, "moe_layer_end_index")
    return {"moe_layers": [int(first <= i <= last and (i + 1) % step == 0) for i in range(n_layer)]}


def write_moe_layers(config: Config) -> dict[str, Any]:
    on = [i for i in range(config.n_layer) if config.mlp_class(i) == "LLaMAMoE"] or [config.n_layer]
    step = on[1] - on[0] if len(on) > 1 else on[0] + 1
    return {"moe_layer_start_index": on[0], "moe_layer_end_index": on[-1], "moe_layer_interval": step}


def layer(config: Config) -> Rules:
    bias = Stored("mlp.moe_statics.e_score_correction_bias", one_row=True)
    return {**glm4_moe.layer(config), "mlp.gate.e_score_correction_bias": bias}


FAMILY = Family(
    "Ernie4_5_MoeForCausalLM",
    [
        *sizes(kv_heads=4, tied=True),
        rope(base=500000.0),
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-5),
        only("use_bias", False),
        ("moe_num_experts", "n_expert", 64),
        ("moe_k", "n_expert_per_token", 6),
        (
            "moe_intermediate_size",
            "moe_intermediate_size",
            1536,
            lambda c: c.moe_intermediate_size or c.intermediate_size,
        ),
        Part(
            lambda fields: {"n_shared_expert": count(fields, "moe_num_shared_experts", 2)},
            lambda config: {"moe_num_shared_experts": config.n_shared_expert},
        ),
        Part(read_moe_layers, write_moe_layers),
        only("moe_norm_min", 1e-12),
    ],
    switches={"mlp_class_name": "LLaMAMoE", "router_bias": True, "rope_interleave": True},
    layer=layer,
    kept=rf"{MTP}|^model\.mtp_",
    aliases=replace(qwen3_moe.FAMILY.aliases, renames=[(r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics.")]),
)
