"""Arcee's AFM-4.5B: Llama without a gate, and with the square of ReLU instead of SiLU."""

from litgpt.families.common import ATTENTION_BIAS, gelu, rope, sizes
from litgpt.families.family import LAYER, Family, Row
from litgpt.families.table import Rules

BIASES: list[Row] = [ATTENTION_BIAS, ("mlp_bias", "mlp_bias", False)]
UNGATED: Rules = {**LAYER, "mlp.fc": "mlp.up_proj"}
FAMILY = Family(
    "ArceeForCausalLM",
    [*sizes(), rope(), gelu("hidden_act", "relu2"), ("rms_norm_eps", "norm_eps", 1e-5), *BIASES],
    layer=UNGATED,
)
