"""Mixtral: Mistral with a mixture of experts in every layer (https://arxiv.org/abs/2401.04088)."""

from litgpt.families.common import WINDOW, only, rope, sizes
from litgpt.families.family import LAYER, Family, Field
from litgpt.families.table import Aliases, Rules
from litgpt.model.config import Config

EXPERT_SIZE = Field(
    "intermediate_size", "intermediate_size", written=lambda c: c.moe_intermediate_size or c.intermediate_size
)


def layer(config: Config) -> Rules:
    rules = {ours: hf for ours, hf in LAYER.items() if not ours.startswith("mlp.")}
    rules["mlp.gate"] = "block_sparse_moe.gate"
    for expert in range(config.n_expert):
        theirs = f"block_sparse_moe.experts.{expert}."
        rules[f"mlp.experts.{expert}.fc"] = [theirs + "w1", theirs + "w3"]
        rules[f"mlp.experts.{expert}.proj"] = theirs + "w2"
    return rules


FAMILY = Family(
    "MixtralForCausalLM",
    [
        *sizes(kv_heads=8),
        rope(base=1000000.0),
        EXPERT_SIZE,
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-5),
        WINDOW,
        ("num_local_experts", "n_expert", 8),
        ("num_experts_per_tok", "n_expert_per_token", 2),
        only("layer_types", None),
    ],
    switches={"mlp_class_name": "LLaMAMoE"},
    layer=layer,
    aliases=Aliases(
        renames=[(r"\.mlp\.(experts|gate)\b", r".block_sparse_moe.\1")],
        stacks={
            ".experts.gate_up_proj": (".experts.{}.w1.weight", ".experts.{}.w3.weight"),
            ".experts.down_proj": (".experts.{}.w2.weight",),
        },
        memory=[(r"\.block_sparse_moe\.", ".mlp.")],
    ),
)
