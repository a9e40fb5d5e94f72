"""Cohere 2: Command R7B and Command A. Parallel residuals on one LayerNorm without bias; a rope of neighbors in the
layers with a window, and none in the others (https://arxiv.org/abs/2504.00698)."""

from typing import Any

from litgpt.families.common import ATTENTION_BIAS, gate, only, rope, sizes, windows
from litgpt.families.family import Family, Part, number

WINDOWS = windows(every=4, key="sliding_window_pattern")


def read_layers(fields: dict[str, Any]) -> dict[str, Any]:
    """The layers with a window, which are those with a rope."""
    found = WINDOWS.read(fields)
    return found | {"rope_layers": found.get("sliding_window_indices", [0] * fields["num_hidden_layers"])}


FAMILY = Family(
    "Cohere2ForCausalLM",
    [
        *sizes(tied=True),
        rope(),
        Part(read_layers, WINDOWS.write),
        gate(),
        ("layer_norm_eps", "norm_eps", 1e-5),
        ATTENTION_BIAS,
        Part(
            lambda fields: {"logits_scaling": 1 / number(fields, "logit_scale", 0.0625)},
            lambda config: {"logit_scale": 1 / config.logits_scaling},
        ),
        *(only(key, True) for key in ("use_parallel_block", "use_gated_activation")),
        only("use_qk_norm", False),
        only("rotary_pct", 1),
        only("position_embedding_type", "rope_gptj"),
    ],
    switches={
        "norm_class_name": "LayerNorm",
        "norm_bias": False,
        "parallel_residual": True,
        "shared_attention_norm": True,
        "rope_interleave": True,
    },
)
