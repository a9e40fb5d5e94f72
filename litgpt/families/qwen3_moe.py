"""Qwen3 with a mixture of experts in most layers (https://arxiv.org/abs/2505.09388)."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import epsilon, flag, read_rope, read_sizes, require_value, whole
from litgpt.families.llama import ENDS, LAYER, QK_NORMS
from litgpt.families.table import Aliases, NameTable, in_layers
from litgpt.families.writing import write_rope, write_sizes
from litgpt.model.config import Config

ALIASES = Aliases(
    stacks={
        ".experts.gate_up_proj": (".experts.{}.gate_proj.weight", ".experts.{}.up_proj.weight"),
        ".experts.down_proj": (".experts.{}.down_proj.weight",),
    }
)


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "hidden_act", "silu", "swish")
    require_value(fields, "layer_types", None)
    attention_bias = flag(fields, "attention_bias")
    n_layer, step = whole(fields, "num_hidden_layers"), whole(fields, "decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise UserError(f"config.json has mlp_only_layers {dense!r}; a list of numbers of layers is wanted.")
    window = whole({"sliding_window": 4096} | fields, "sliding_window", None)
    return Config(
        **read_sizes(fields, kv_heads=4),
        **read_rope(fields),
        mlp_class_name="LLaMAMoE",
        n_expert=whole(fields, "num_experts", whole(fields, "num_local_experts", 128)),
        n_expert_per_token=whole(fields, "num_experts_per_tok", 8),
        moe_intermediate_size=whole(fields, "moe_intermediate_size", 768),
        moe_layers=[int(i not in dense and (i + 1) % step == 0) for i in range(n_layer)],
        norm_topk_prob=flag(fields, "norm_topk_prob"),
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-6),
        norm_qk=True,
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        sliding_window_size=window if flag(fields, "use_sliding_window") else None,
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attn_bias,
        "num_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
        "moe_intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.n_layer) if config.mlp_class(i) != "LLaMAMoE"],
        "use_sliding_window": config.window(0) is not None,
        "sliding_window": config.window(0),
    }


def name_table(config: Config) -> NameTable:
    layer = {**LAYER, **QK_NORMS, "mlp.gate": "mlp.gate"}
    for expert in range(config.n_expert):
        prefix = f"mlp.experts.{expert}."
        layer[prefix + "fc"] = [prefix + "gate_proj", prefix + "up_proj"]
        layer[prefix + "proj"] = prefix + "down_proj"
    return NameTable(ENDS | in_layers(config.n_layer, layer))
