"""Nemotron and Minitron: LayerNorms that scale by 1 + weight, partial rotary embedding, and the square of ReLU without
a gate (https://arxiv.org/abs/2402.16819)."""

from litgpt.families.arcee import BIASES, UNGATED
from litgpt.families.common import gelu, rope, sizes
from litgpt.families.family import Family

FAMILY = Family(
    "NemotronForCausalLM",
    [*sizes(), rope(partial=0.5), gelu("hidden_act", "relu2"), ("norm_eps", "norm_eps", 1e-5), *BIASES],
    switches={"norm_class_name": "LayerNorm", "norm_unit_offset": True},
    layer=UNGATED,
)
