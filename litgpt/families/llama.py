"""Llama: grouped-query attention, SwiGLU, RMSNorm, rotary embedding. Most families begin from here."""

from litgpt.families.common import ATTENTION_BIAS, gate, rope, sizes
from litgpt.families.family import Family, Row

BLOCK: list[Row] = [gate(), ("rms_norm_eps", "norm_eps", 1e-6), ATTENTION_BIAS, ("mlp_bias", "mlp_bias", False)]
ROWS: list[Row] = [*sizes(), rope(), *BLOCK]
FAMILY = Family("LlamaForCausalLM", ROWS)
