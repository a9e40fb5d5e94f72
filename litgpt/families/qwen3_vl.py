"""Qwen3-VL: its text part, which is a Qwen3 (https://arxiv.org/abs/2511.21631)."""

from dataclasses import replace

from litgpt.families import qwen3
from litgpt.families.common import ATTENTION_BIAS, gate, only, rope_of_text, sizes
from litgpt.families.container import QWEN, container

TEXT = replace(
    qwen3.FAMILY,
    rows=[
        *sizes(kv_heads=32, head_dim=128),
        rope_of_text(base=500000.0),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-6),
        ATTENTION_BIAS,
        only("use_sliding_window", False),  # transformers ignores it
    ],
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 128000,
    },
)
FAMILY = container(
    TEXT,
    "qwen3_vl_text",
    alone="qwen3",
    architecture="Qwen3VLForConditionalGeneration",
    **QWEN,
)
