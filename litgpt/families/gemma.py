"""Gemma: GeGLU, norms that scale by 1 + weight, embeddings scaled by the root of the width
(https://arxiv.org/abs/2403.08295)."""

from typing import Any

from litgpt.families.common import ATTENTION_BIAS, gate, only, rope, sizes, write_activation
from litgpt.families.family import Family, Part, Row, require_value

NORMS: list[Row] = [("rms_norm_eps", "norm_eps", 1e-6), ATTENTION_BIAS]  # in all generations of Gemma
SWITCHES = {"norm_unit_offset": True, "scale_embeddings": True}
GATE = gate(default="gelu_pytorch_tanh")


def read_activation(fields: dict[str, Any]) -> dict[str, Any]:
    require_value(fields, "hidden_activation", None, "gelu_pytorch_tanh")
    if fields.get("hidden_act") == "gelu":  # as the first files say, which mean the tanh
        fields = fields | {"hidden_act": "gelu_pytorch_tanh"}
    return GATE.read(fields)


FAMILY = Family(
    "GemmaForCausalLM",
    [
        *sizes(kv_heads=16, head_dim=256, tied=True),
        rope(),
        Part(read_activation, lambda config: {"hidden_activation": write_activation(config)}),
        *NORMS,
        Part(write=GATE.write),
        only("use_bidirectional_attention", None, False),
    ],
    SWITCHES,
)
