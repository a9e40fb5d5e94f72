"""Mistral: Llama with a sliding window in every layer (https://arxiv.org/abs/2310.06825)."""

from litgpt.families.common import WINDOW, gate, only, rope, sizes
from litgpt.families.family import Family

FAMILY = Family(
    "MistralForCausalLM",
    [*sizes(kv_heads=8), rope(), gate(), ("rms_norm_eps", "norm_eps", 1e-6), WINDOW, only("layer_types", None)],
    defaults={"sliding_window": 4096},
)
