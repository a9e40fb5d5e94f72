"""dots.llm1: GLM-4.5's router and Qwen3's attention, with windows in late layers (https://arxiv.org/abs/2506.05767)."""

from typing import Any

from litgpt.families import glm4_moe, qwen3_moe
from litgpt.families.common import (
    ATTENTION_BIAS,
    SIGMOID_EXPERTS,
    SIGMOID_ROUTER,
    only,
    read_dense_first,
    read_windows,
    rope,
    sizes,
    write_dense_first,
    write_layer_types,
)
from litgpt.families.family import Family, Part, integer, number


def read_late_windows(fields: dict[str, Any]) -> dict[str, Any]:
    window, first = {"sliding_window": 4096, **fields}["sliding_window"], number(fields, "max_window_layers", 62)
    local = [window is not None and i >= first for i in range(integer(fields, "num_hidden_layers"))]
    return read_windows(fields, ["sliding_attention" if on else "full_attention" for on in local], size=4096)


FAMILY = Family(
    "Dots1ForCausalLM",
    [
        *sizes(),
        rope(),
        only("hidden_act", "silu", "swish", written="silu"),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ATTENTION_BIAS,
        *SIGMOID_EXPERTS,
        Part(read_dense_first, write_dense_first),
        Part(read_late_windows, write_layer_types),
    ],
    switches={**SIGMOID_ROUTER, "norm_qk": True},
    defaults={
        "num_key_value_heads": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    layer=glm4_moe.layer,
    aliases=qwen3_moe.FAMILY.aliases,
)
