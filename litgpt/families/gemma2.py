"""Gemma 2: soft caps, four norms a block, every other layer with a window (https://arxiv.org/abs/2408.00118)."""

from typing import Any

from litgpt.families.common import gate, only, rope, sizes, windows
from litgpt.families.family import LAYER, Family, Part, Row, number
from litgpt.families.gemma import NORMS, SWITCHES
from litgpt.families.table import Rules
from litgpt.model.config import Config

FOUR_NORMS: Rules = {
    **LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
FOUR_NORMS_SWITCHES = {**SWITCHES, "post_attention_norm": True, "post_mlp_norm": True}


def write_scalar(config: Config) -> dict[str, Any]:
    scalar = float(config.attention_scores_scalar or config.head_size or 0)
    return {"query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar}


BLOCK: list[Row] = [  # of Gemma 2 and 3
    gate("hidden_activation", "gelu_pytorch_tanh"),
    *NORMS,
    only("use_bidirectional_attention", None, False),
]
SCALAR = Part(
    lambda fields: {"attention_scores_scalar": float(number(fields, "query_pre_attn_scalar", 256))}, write_scalar
)
FAMILY = Family(
    "Gemma2ForCausalLM",
    [
        *sizes(kv_heads=4, head_dim=256, tied=True),
        rope(),
        windows(every=2),
        *BLOCK,
        SCALAR,
        ("attn_logit_softcapping", "attention_logit_softcapping", 50.0),
        ("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ],
    FOUR_NORMS_SWITCHES,
    layer=FOUR_NORMS,
)
