"""OLMo 2: norms after attention and feed-forward, none before; norms of queries and keys over all heads
(https://arxiv.org/abs/2501.00656)."""

from typing import Any

from litgpt.families.common import epsilon, flag, read_gate, read_rope, read_sizes
from litgpt.families.llama import ENDS, LAYER, QK_NORMS
from litgpt.families.table import NameTable, in_layers
from litgpt.families.writing import write_activation, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    return Config(**read_sizes(fields), **read_rope(fields), **read_shared(fields))


def read_shared(fields: dict[str, Any]) -> dict[str, Any]:
    """What OLMo 2 and 3 have in common."""
    attention_bias = flag(fields, "attention_bias")
    return {
        **read_gate(fields),
        "norm_eps": epsilon(fields, "rms_norm_eps", 1e-5),
        "norm_1": False,
        "norm_2": False,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "norm_qk": True,
        "norm_qk_type": "olmo2",
        "attn_bias": attention_bias,
        "attn_proj_bias": attention_bias,
        "tie_embeddings": flag(fields, "tie_word_embeddings"),
    }


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["Olmo2ForCausalLM"],
        **write_sizes(config, head_dim=config.head_size != config.n_embd // config.n_head),
        **write_rope(config),
        **write_shared(config),
    }


def write_shared(config: Config) -> dict[str, Any]:
    return {
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attn_bias,
    }


def name_table(config: Config) -> NameTable:
    layer = {ours: hf for ours, hf in LAYER.items() if not ours.startswith("norm_")} | dict(QK_NORMS)
    layer |= {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
    return NameTable(ENDS | in_layers(config.n_layer, layer))
