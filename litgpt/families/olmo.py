"""OLMo: Llama with LayerNorms that have no weights (https://arxiv.org/abs/2402.00838)."""

from litgpt.families.common import ATTENTION_BIAS, gate, rope, sizes
from litgpt.families.family import Family

FAMILY = Family(
    "OlmoForCausalLM",
    [*sizes(always=False), rope(), gate(), ATTENTION_BIAS, ("clip_qkv", "clip_qkv", None)],
    switches={"norm_class_name": "LayerNorm", "norm_affine": False, "norm_eps": 1e-5},
)
