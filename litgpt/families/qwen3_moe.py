"""Qwen3 with a mixture of experts in most layers (https://arxiv.org/abs/2505.09388)."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import ATTENTION_BIAS, WINDOW, only, rope, sizes
from litgpt.families.family import LAYER, QK_NORMS, Family, Field, Part, Row, flag, integer
from litgpt.families.table import Aliases, Rules
from litgpt.model.config import Config


def read_moe_layers(fields: dict[str, Any]) -> dict[str, Any]:
    n_layer, step = integer(fields, "num_hidden_layers"), integer(fields, "decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise UserError(f"config.json has mlp_only_layers {dense!r}. Expected a list of layer indices.")
    return {"moe_layers": [int(i not in dense and (i + 1) % step == 0) for i in range(n_layer)]}


def write_moe_layers(config: Config) -> dict[str, Any]:
    dense = [i for i in range(config.n_layer) if config.mlp_class(i) != "LLaMAMoE"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def read_window(fields: dict[str, Any]) -> dict[str, Any]:
    window = integer({"sliding_window": 4096} | fields, "sliding_window", None)
    return {"sliding_window_size": window if flag(fields, "use_sliding_window") else None}


def layer(config: Config) -> Rules:
    rules = {**LAYER, **QK_NORMS, "mlp.gate": "mlp.gate"}
    for expert in range(config.n_expert):
        prefix = f"mlp.experts.{expert}."
        rules[prefix + "fc"] = [prefix + "gate_proj", prefix + "up_proj"]
        rules[prefix + "proj"] = prefix + "down_proj"
    return rules


def experts(default: int) -> Part:
    """The number of experts, under either of its names."""
    return Part(
        lambda fields: {"n_expert": integer(fields, "num_experts", integer(fields, "num_local_experts", default))},
        lambda config: {"num_experts": config.n_expert},
    )


def expert_rows(size: int) -> list[Row]:
    """The width of an expert, the shares of a token's experts, and the layers that have experts."""
    width = Field(
        "moe_intermediate_size", "moe_intermediate_size", size, lambda c: c.moe_intermediate_size or c.intermediate_size
    )
    return [width, ("norm_topk_prob", "norm_topk_prob", False), Part(read_moe_layers, write_moe_layers)]


ALIASES = Aliases(
    stacks={
        ".experts.gate_up_proj": (".experts.{}.gate_proj.weight", ".experts.{}.up_proj.weight"),
        ".experts.down_proj": (".experts.{}.down_proj.weight",),
    }
)
FAMILY = Family(
    "Qwen3MoeForCausalLM",
    [
        *sizes(kv_heads=4),
        rope(),
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ATTENTION_BIAS,
        experts(128),
        ("num_experts_per_tok", "n_expert_per_token", 8),
        *expert_rows(768),
        WINDOW,
        Part(read_window, lambda config: {"use_sliding_window": config.window(0) is not None}),
        only("layer_types", None),
    ],
    switches={"mlp_class_name": "LLaMAMoE", "norm_qk": True},
    layer=layer,
    aliases=ALIASES,
)
