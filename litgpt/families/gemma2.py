"""Gemma 2: soft caps, four norms a block, every other layer with a window (https://arxiv.org/abs/2408.00118)."""

from typing import Any, Optional

from litgpt.families.common import number, read_gate, read_rope, read_sizes, read_windows, require_value, whole
from litgpt.families.gemma import read_shared, write_shared
from litgpt.families.llama import ENDS, LAYER
from litgpt.families.table import NameTable, Rules, in_layers
from litgpt.families.writing import write_layer_types, write_rope, write_sizes
from litgpt.model.config import Config

FOUR_NORMS: Rules = {
    **LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def read_config(fields: dict[str, Any]) -> Config:
    layers = range(whole(fields, "num_hidden_layers"))
    alternating = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in layers]
    return Config(
        **read_sizes(fields, kv_heads=4, head_dim=256),
        **read_rope(fields),
        **read_windows(fields, alternating, size=4096),
        **read_shared(fields),
        **read_caps_and_norms(fields, attention_cap=50.0, final_cap=30.0),
    )


def read_caps_and_norms(
    fields: dict[str, Any], attention_cap: Optional[float] = None, final_cap: Optional[float] = None
) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common beyond Gemma."""
    require_value(fields, "use_bidirectional_attention", None, False)
    caps = {"attn_logit_softcapping": attention_cap, "final_logit_softcapping": final_cap} | fields
    return {
        **read_gate(fields, "hidden_activation", "gelu_pytorch_tanh"),
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "attention_scores_scalar": float(number(fields, "query_pre_attn_scalar", 256)),
        "attention_logit_softcapping": number(caps, "attn_logit_softcapping", None),
        "final_logit_softcapping": number(caps, "final_logit_softcapping", None),
    }


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        **write_sizes(config),
        **write_rope(config),
        **write_layer_types(config),
        **write_shared(config),
        "query_pre_attn_scalar": write_scalar(config),
        "attn_logit_softcapping": config.attention_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def write_scalar(config: Config) -> Any:
    scalar = float(config.attention_scores_scalar or config.head_size or 0)
    return int(scalar) if scalar.is_integer() else scalar


def name_table(config: Config) -> NameTable:
    return NameTable(ENDS | in_layers(config.n_layer, FOUR_NORMS))
