"""GLM-4.7-Flash: GLM-4.5's router, and DeepSeek's latent attention (https://huggingface.co/zai-org/GLM-4.7-Flash)."""

from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families import deepseek_v3
from litgpt.families.family import Part, integer
from litgpt.model.config import Config


def read_layers(fields: dict[str, Any]) -> dict[str, Any]:
    n_layer = integer(fields, "num_hidden_layers")
    types = fields.get("mlp_layer_types", ["dense"] + ["sparse"] * (n_layer - 1))
    if not isinstance(types, list) or len(types) != n_layer or not all(t in ("dense", "sparse") for t in types):
        raise UserError(f"config.json has mlp_layer_types {types!r}. Expected 'dense' or 'sparse' for each layer.")
    return {"moe_layers": [int(t == "sparse") for t in types]}


def write_layers(config: Config) -> dict[str, Any]:
    mlps = [config.mlp_class(i) for i in range(config.n_layer)]
    return {"mlp_layer_types": ["sparse" if mlp == "LLaMAMoE" else "dense" for mlp in mlps]}


FAMILY = replace(
    deepseek_v3.FAMILY,
    architecture="Glm4MoeLiteForCausalLM",
    rows=[*deepseek_v3.ROWS, Part(read_layers, write_layers)],
    defaults={
        "num_key_value_heads": 20,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
    },
)
