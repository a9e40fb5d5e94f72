"""LFM2: most layers are short convolutions, the others have attention with norms of queries and keys
(https://arxiv.org/abs/2511.23404)."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import hybrid_layers, rope, sizes
from litgpt.families.family import ENDS, LAYER, Family, Part, flag, integer, number
from litgpt.model.config import Config


def default_types(fields: dict[str, Any], n_layer: int) -> list[str]:
    attending = fields.get("full_attn_idxs", list(range(n_layer)))
    if not isinstance(attending, list) or not all(isinstance(i, int) for i in attending):
        raise UserError(f"config.json has full_attn_idxs {attending!r}. Expected a list of layers.")
    return ["full_attention" if i in attending else "conv" for i in range(n_layer)]


def read_width(fields: dict[str, Any]) -> dict[str, Any]:
    """Of the feed-forward part: two thirds of a number, rounded up to a multiple, unless that is switched off."""
    width = integer(fields, "block_ff_dim", integer(fields, "intermediate_size", 12288))
    if flag(fields, "block_auto_adjust_ff_dim", True):
        width = int(number(fields, "block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        multiple = integer(fields, "block_multiple_of", 256)
        width = -(-width // multiple) * multiple
    if width < 1:
        raise UserError("config.json describes a feed-forward part without width (block_ffn_dim_multiplier).")
    return {"intermediate_size": width}


def write_width(config: Config) -> dict[str, Any]:
    return {"intermediate_size": config.intermediate_size, "block_auto_adjust_ff_dim": False}


FAMILY = Family(
    "Lfm2ForCausalLM",
    [
        *sizes(kv_heads=8, tied=True, always=False),
        Part(lambda fields: {"tie_embeddings": flag(fields, "tie_embedding")} if "tie_embedding" in fields else {}),
        Part(read_width, write_width),
        rope(base=1000000.0),
        ("norm_eps", "norm_eps", 1e-5),
        hybrid_layers("conv", default_types),
        ("conv_L_cache", "conv_size", 3),
        ("conv_bias", "conv_bias recurrent_bias", False),
    ],
    switches={"norm_qk": True, "recurrent_class_name": "ShortConv"},
    defaults={
        "vocab_size": 65536,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 128000,
    },
    layer={
        **LAYER,
        "norm_1": "operator_norm",
        "norm_2": "ffn_norm",
        "attn.proj": "self_attn.out_proj",
        "attn.norm_q": "self_attn.q_layernorm",
        "attn.norm_k": "self_attn.k_layernorm",
        "attn.in_proj": "conv.in_proj",
        "attn.conv": "conv.conv",
        "attn.out": "conv.out_proj",
        "mlp.fc": ["feed_forward.w1", "feed_forward.w3"],
        "mlp.proj": "feed_forward.w2",
    },
    ends={**ENDS, "transformer.ln_f": "model.embedding_norm"},
)
