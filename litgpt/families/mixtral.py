"""Mixtral: Mistral with a mixture of experts in every layer (https://arxiv.org/abs/2401.04088)."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_rope, read_sizes, require_value, whole
from litgpt.families.llama import ENDS, LAYER
from litgpt.families.table import Aliases, NameTable, in_layers
from litgpt.families.writing import write_rope, write_sizes
from litgpt.model.config import Config

EXPERTS = "block_sparse_moe.experts.{}."
ALIASES = Aliases(
    renames=[(r"\.mlp\.(experts|gate)\b", r".block_sparse_moe.\1")],
    stacks={
        ".experts.gate_up_proj": (".experts.{}.w1.weight", ".experts.{}.w3.weight"),
        ".experts.down_proj": (".experts.{}.w2.weight",),
    },
    memory=[(r"\.block_sparse_moe\.", ".mlp.")],
)


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "hidden_act", "silu", "swish")
    require_value(fields, "layer_types", None)
    return Config(
        **read_sizes(fields, kv_heads=8),
        **read_rope(fields, base=1000000.0),
        mlp_class_name="LLaMAMoE",
        n_expert=whole(fields, "num_local_experts", 8),
        n_expert_per_token=whole(fields, "num_experts_per_tok", 2),
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-5),
        sliding_window_size=whole(fields, "sliding_window", None),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        "intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.window(0),
        "num_local_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
    }


def name_table(config: Config) -> NameTable:
    layer = {ours: hf for ours, hf in LAYER.items() if not ours.startswith("mlp.")}
    layer["mlp.gate"] = "block_sparse_moe.gate"
    for expert in range(config.n_expert):
        prefix = EXPERTS.format(expert)
        layer[f"mlp.experts.{expert}.fc"] = [prefix + "w1", prefix + "w3"]
        layer[f"mlp.experts.{expert}.proj"] = prefix + "w2"
    return NameTable(ENDS | in_layers(config.n_layer, layer))
