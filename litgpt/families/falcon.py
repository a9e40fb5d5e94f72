"""Falcon: 7b with one key-value head, 40b and 180B with several; LayerNorm, no gate (https://arxiv.org/abs/2311.16867)."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import gelu, only, rope, whole_heads
from litgpt.families.family import Family, Part, flag, integer
from litgpt.families.table import Rules, Stored, rows_by_group
from litgpt.model.config import Config


def read_width(fields: dict[str, Any]) -> dict[str, Any]:
    width = integer(fields, "n_embed", None) or integer(fields, "hidden_size")  # `n_embed` is an older name
    return {"n_embd": width} | whole_heads("hidden_size", "num_attention_heads").read(fields | {"hidden_size": width})


def read_block(fields: dict[str, Any]) -> dict[str, Any]:
    """The key-value heads and the norms, on which the three generations differ."""
    new, parallel = flag(fields, "new_decoder_architecture"), flag(fields, "parallel_attn", True)
    norms = fields.get("num_ln_in_parallel_attn")
    if new and not parallel:
        raise UserError("config.json has parallel_attn false with new_decoder_architecture true: no such model exists.")
    if norms not in ((None, 1, 2) if new else (None, 1)):
        raise UserError(f"config.json has num_ln_in_parallel_attn {norms!r} with new_decoder_architecture {new}.")
    n_head = integer(fields, "num_attention_heads")
    groups = integer(fields, "num_kv_heads", n_head)
    if not new:
        groups = 1 if flag(fields, "multi_query", True) else n_head
    return {
        "n_query_groups": groups,
        "parallel_residual": parallel,
        "shared_attention_norm": parallel and (norms == 1 or not new),
    }


def write_block(config: Config) -> dict[str, Any]:
    single, shared = config.n_query_groups == 1, config.shared_attention_norm
    old = not config.parallel_residual or (shared and (single or config.n_query_groups == config.n_head))
    return ({} if old else {"num_ln_in_parallel_attn": 1 if shared else 2}) | {
        "new_decoder_architecture": not old,
        "multi_query": old and single,
        "parallel_attn": config.parallel_residual,
    }


def layer(config: Config) -> Rules:
    rows = rows_by_group(config.n_head, config.n_query_groups, config.head_size)
    two_norms = config.parallel_residual and not config.shared_attention_norm
    return {
        "norm_1": "ln_attn" if two_norms else "input_layernorm",
        "attn.qkv": Stored("self_attention.query_key_value", rows),
        "attn.proj": "self_attention.dense",
        "norm_2": "ln_mlp" if two_norms else "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    }


FAMILY = Family(
    "FalconForCausalLM",
    [
        ("vocab_size", "padded_vocab_size"),
        Part(read_width, lambda config: {"hidden_size": config.n_embd}),
        ("ffn_hidden_size", "intermediate_size", None),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("num_kv_heads", "n_query_groups", None),
        ("max_position_embeddings", "block_size", 2048),
        ("tie_word_embeddings", "tie_embeddings", True),
        rope(),
        Part(read_block, write_block),
        only("alibi", False, None, written=False),
        gelu("activation", "gelu"),
        ("layer_norm_epsilon", "norm_eps", 1e-5),
        ("bias", "bias", False),
    ],
    switches={"norm_class_name": "LayerNorm"},
    layer=layer,
    ends={
        "transformer.wte": "transformer.word_embeddings",
        "transformer.ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    prefix="transformer.h.{}.",
)
