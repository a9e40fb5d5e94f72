"""The model, in torch alone. The names that LitGPT's users import from here are imported on first use."""

import importlib
from typing import Any

PUBLIC = {
    "Block": "litgpt.model.gpt",
    "CausalSelfAttention": "litgpt.model.attention",
    "Config": "litgpt.litgpt_format.config",
    "GPT": "litgpt.litgpt_format.model",
    "GemmaMLP": "litgpt.model.mlp",
    "GptNeoxMLP": "litgpt.model.mlp",
    "KVCache": "litgpt.model.kv_cache",
    "LLaMAMLP": "litgpt.model.mlp",
    "LLaMAMoE": "litgpt.model.mlp",
    "RMSNorm": "litgpt.model.norm",
    "apply_rope": "litgpt.litgpt_format.rope",
    "build_rope_cache": "litgpt.litgpt_format.rope",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'litgpt.model' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)
