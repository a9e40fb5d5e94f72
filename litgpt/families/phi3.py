"""Phi-3, Phi-3.5, Phi-4: Llama with fused weights, longrope and partial rotary embedding
(https://arxiv.org/abs/2404.14219)."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_rope, read_sizes, rope_object, whole
from litgpt.families.llama import ENDS, LAYER
from litgpt.families.table import NameTable, in_layers
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = rope_object(fields.get(key), key)
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # earlier words for it
        rope["rope_type"] = "longrope"
    roped = {"original_max_position_embeddings": 4096} | fields | {key: rope}
    return Config(
        **read_sizes(fields),
        **read_gate(fields),
        **read_rope(roped, partial=1.0, types=("default", "longrope")),
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-5),
        sliding_window_size=whole(fields, "sliding_window", None),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    length = config.rope_adjustments.get("original_max_position_embeddings", config.block_size)
    return {
        "architectures": ["Phi3ForCausalLM"],
        **write_sizes(config, head_dim=config.head_size != config.n_embd // config.n_head),
        **write_rope(config, partial=True),
        "original_max_position_embeddings": length,
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.window(0),
        "pad_token_id": None,  # the default of transformers may lie beyond the vocabulary
    }


def name_table(config: Config) -> NameTable:
    fused = {"attn.qkv": "self_attn.qkv_proj", "mlp.fc": "mlp.gate_up_proj"}
    return NameTable(ENDS | in_layers(config.n_layer, {**LAYER, **fused}))
