"""OLMo 2: norms after attention and feed-forward, none before; norms of queries and keys over all heads
(https://arxiv.org/abs/2501.00656)."""

from litgpt.families.common import ATTENTION_BIAS, gate, rope, sizes
from litgpt.families.family import LAYER, QK_NORMS, Family, Row

ROWS: list[Row] = [gate(), ("rms_norm_eps", "norm_eps", 1e-5), ATTENTION_BIAS]  # of OLMo 2 and 3
SWITCHES = {
    "norm_1": False,
    "norm_2": False,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "norm_qk": True,
    "norm_qk_type": "olmo2",
}
NORMS = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
RULES = {ours: hf for ours, hf in LAYER.items() if not ours.startswith("norm_")} | {**QK_NORMS, **NORMS}
FAMILY = Family("Olmo2ForCausalLM", [*sizes(always=False), rope(), *ROWS], SWITCHES, layer=RULES)
