"""The text part of Qwen3.5: three of four layers are gated delta nets, the others have attention with a gate
(https://qwen.ai/blog?id=qwen3.5)."""

from typing import Any

from litgpt.families.common import ATTENTION_BIAS, gate, hybrid_layers, rope_of_text, sizes
from litgpt.families.family import LAYER, QK_NORMS, Family, Row, integer
from litgpt.families.table import Aliases


def default_types(fields: dict[str, Any], n_layer: int) -> list[str]:
    every = integer(fields, "full_attention_interval", 4)
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n_layer)]


GATE = gate()
NUMBERS: list[Row] = [
    rope_of_text(base=10000.0, partial=0.25),
    GATE,
    ("rms_norm_eps", "norm_eps", 1e-6),
    ATTENTION_BIAS,
    hybrid_layers("linear_attention", default_types),
    ("linear_conv_kernel_dim", "conv_size", 4),
    ("linear_key_head_dim", "linear_key_size", 128),
    ("linear_value_head_dim", "linear_value_size", 128),
    ("linear_num_key_heads", "linear_key_heads", 16),
    ("linear_num_value_heads", "linear_value_heads", 32),
]
NET = {f"attn.{ours}": f"linear_attn.{hf}" for ours, hf in (
    ("in_qkv", "in_proj_qkv"), ("in_gate", "in_proj_z"), ("in_beta", "in_proj_b"), ("in_step", "in_proj_a"),
    ("conv", "conv1d"), ("A_log", "A_log"), ("dt_bias", "dt_bias"), ("norm", "norm"), ("out", "out_proj"),
)}  # fmt: skip
SWITCHES = {"norm_qk": True, "norm_unit_offset": True, "attention_gate": True}
ALIASES = Aliases(renames=[(r"^model\.language_model\.", "model.")])
FAMILY = Family(
    "Qwen3_5ForCausalLM",
    [*sizes(kv_heads=4, head_dim=256), *NUMBERS],
    switches=SWITCHES,
    defaults={
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "max_position_embeddings": 32768,
    },
    layer={**LAYER, **QK_NORMS, **NET},
    aliases=ALIASES,
)
