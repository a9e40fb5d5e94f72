"""Falcon: 7b with one key-value head, 40b and 180B with several; LayerNorm, no gate (https://arxiv.org/abs/2311.16867)."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import epsilon, flag, gelu, read_rope, require_value, whole
from litgpt.families.table import HFModules, NameTable, Stored, in_layers, rows_by_group
from litgpt.families.writing import write_activation, write_rope
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "alibi", False, None)
    new = flag(fields, "new_decoder_architecture")
    parallel = flag(fields, "parallel_attn", True)
    norms = fields.get("num_ln_in_parallel_attn")
    if new and not parallel:
        raise UserError("config.json has parallel_attn false with new_decoder_architecture true: no such model exists.")
    if norms not in ((None, 1, 2) if new else (None, 1)):
        raise UserError(f"config.json has num_ln_in_parallel_attn {norms!r} with new_decoder_architecture {new}.")
    n_head = whole(fields, "num_attention_heads")
    groups = whole(fields, "num_kv_heads", n_head)
    if not new:
        groups = 1 if flag(fields, "multi_query", True) else n_head
    width = whole(fields, "n_embed", None) or whole(fields, "hidden_size")
    if width % n_head:
        raise UserError(f"config.json has hidden_size {width} for {n_head} heads: no multiple.")
    return Config(
        block_size=whole(fields, "max_position_embeddings", 2048),
        padded_vocab_size=whole(fields, "vocab_size"),
        n_layer=whole(fields, "num_hidden_layers"),
        n_embd=width,
        n_head=n_head,
        n_query_groups=groups,
        intermediate_size=whole(fields, "ffn_hidden_size", 4 * width),
        **read_rope(fields),
        norm_class_name="LayerNorm",
        norm_eps=epsilon(fields, "layer_norm_epsilon", 1e-5),
        parallel_residual=parallel,
        shared_attention_norm=parallel and (norms == 1 or not new),
        bias=flag(fields, "bias"),
        mlp_class_name="GptNeoxMLP",
        gelu_approximate=gelu(fields, "activation", "gelu"),
        tie_embeddings=flag(fields, "tie_word_embeddings", True),
    )


def write_config(config: Config) -> dict[str, Any]:
    single = config.n_query_groups == 1
    old = not config.parallel_residual or (
        config.shared_attention_norm and (single or config.n_query_groups == config.n_head)
    )
    norms = {} if old else {"num_ln_in_parallel_attn": 1 if config.shared_attention_norm else 2}
    return {
        "architectures": ["FalconForCausalLM"],
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "ffn_hidden_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_kv_heads": config.n_query_groups,
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config),
        **norms,
        "new_decoder_architecture": not old,
        "multi_query": old and single,
        "parallel_attn": config.parallel_residual,
        "alibi": False,
        "activation": write_activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "bias": config.bias,
    }


def name_table(config: Config) -> NameTable:
    assert config.head_size is not None and config.n_query_groups is not None
    rows = rows_by_group(config.n_head, config.n_query_groups, config.head_size)
    layer: dict[str, HFModules] = {
        "norm_1": "input_layernorm",
        "attn.qkv": Stored("self_attention.query_key_value", rows),
        "attn.proj": "self_attention.dense",
        "norm_2": "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    }
    if config.parallel_residual and not config.shared_attention_norm:
        layer |= {"norm_1": "ln_attn", "norm_2": "ln_mlp"}
    ends: dict[str, HFModules] = {
        "transformer.wte": "transformer.word_embeddings",
        "transformer.ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    }
    return NameTable(ends | in_layers(config.n_layer, layer, "transformer.h.{}."))
