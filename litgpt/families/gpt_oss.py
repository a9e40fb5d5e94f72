"""gpt-oss: experts with biases and a clamped SwiGLU, and attention sinks (https://arxiv.org/abs/2508.10925).

Files have the experts in stacks, in MXFP4 or not, with the rows of gate and up in turns. The table has a module for
each expert; `Checkpoint` and `write_weights` convert.
"""

from typing import Any

import torch

from litgpt.families.common import only, rope, sizes, windows, write_scaling
from litgpt.families.family import LAYER, Family, Part, integer
from litgpt.families.table import Aliases, Rules, Stored
from litgpt.model.config import Config

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
ROPE = rope(base=150000.0)


def read_rope(fields: dict[str, Any]) -> dict[str, Any]:
    given = fields.get("rope_scaling") or fields.get("rope_parameters")
    return ROPE.read(fields if given else fields | {"rope_parameters": YARN})


def write_rope(config: Config) -> dict[str, Any]:
    return {"rope_theta": config.rope_base, "rope_scaling": write_scaling(config) or {"rope_type": "default"}}


def layer(config: Config) -> Rules:
    rules = {**LAYER, "attn.sinks": "self_attn.sinks", "mlp.gate": "mlp.router"}
    in_turns = torch.arange(2 * config.intermediate_size, device="cpu").view(2, -1).T.flatten()
    for expert in range(config.n_expert):
        prefix = f"mlp.experts.{expert}."
        rules[prefix + "fc"] = Stored(f"{prefix}gate_up_proj", in_turns, transposed=True)
        rules[prefix + "proj"] = Stored(f"{prefix}down_proj", transposed=True)
    return rules


FAMILY = Family(
    "GptOssForCausalLM",
    [
        *sizes(kv_heads=8, head_dim=64),
        Part(read_rope, write_rope),
        windows(2),
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-5),
        ("attention_bias", "attn_bias attn_proj_bias", True),
        Part(
            lambda fields: {"n_expert": integer(fields, "num_local_experts", integer(fields, "num_experts", 128))},
            lambda config: {"num_local_experts": config.n_expert},
        ),
        ("num_experts_per_tok", "n_expert_per_token", 4),
        ("swiglu_alpha", "swiglu_alpha", 1.702),
        ("swiglu_limit", "swiglu_limit", 7.0),
    ],
    switches={"mlp_class_name": "LLaMAMoE", "attention_sinks": True, "mlp_bias": True, "gate_bias": True},
    defaults={"sliding_window": 128},
    layer=layer,
    aliases=Aliases(
        renames=[(r"\.self_attn\.sinks$", ".self_attn.sinks.weight")],
        stacks={
            ".experts.gate_up_proj": (".experts.{}.gate_up_proj.weight",),
            ".experts.down_proj": (".experts.{}.down_proj.weight",),
        },
        memory=[(r"\.self_attn\.sinks\.weight$", ".self_attn.sinks")],
        in_files=True,
    ),
)
