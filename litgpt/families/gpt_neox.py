"""GPT-NeoX: Pythia, StableLM Alpha. Parallel residuals, LayerNorm, partial rotary embedding
(https://arxiv.org/abs/2204.06745)."""

from typing import Any

from litgpt.families.common import epsilon, flag, gelu, read_rope, require_value, whole
from litgpt.families.table import Aliases, HFModules, NameTable, Stored, in_layers, rows_by_group
from litgpt.families.writing import write_activation, write_scaling
from litgpt.model.config import Config

ALIASES = Aliases(renames=[(r"^lm_head\.", "embed_out.")], memory=[(r"^embed_out\b", "lm_head")])


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "partial_rotary_factor", None)
    attention_bias = flag(fields, "attention_bias", True)
    return Config(
        block_size=whole(fields, "max_position_embeddings"),
        padded_vocab_size=whole(fields, "vocab_size"),
        n_layer=whole(fields, "num_hidden_layers"),
        n_embd=whole(fields, "hidden_size"),
        n_head=whole(fields, "num_attention_heads"),
        intermediate_size=whole(fields, "intermediate_size"),
        **read_rope(fields, base_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct"),
        norm_class_name="LayerNorm",
        norm_eps=epsilon(fields, "layer_norm_eps", 1e-5),
        parallel_residual=flag(fields, "use_parallel_residual", True),
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        mlp_bias=True,
        mlp_class_name="GptNeoxMLP",
        gelu_approximate=gelu(fields, "hidden_act", "gelu"),
        tie_embeddings=flag(fields, "tie_word_embeddings"),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": config.tie_embeddings,
        "rotary_pct": config.rotary_percentage,
        "rotary_emb_base": config.rope_base,
        "rope_scaling": write_scaling(config),
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attn_bias,
    }


def name_table(config: Config) -> NameTable:
    assert config.head_size is not None
    layer: dict[str, HFModules] = {
        "norm_1": "input_layernorm",
        "attn.qkv": Stored("attention.query_key_value", rows_by_group(config.n_head, config.n_head, config.head_size)),
        "attn.proj": "attention.dense",
        "norm_2": "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    }
    ends: dict[str, HFModules] = {
        "transformer.wte": "gpt_neox.embed_in",
        "transformer.ln_f": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    }
    unused = r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$"
    return NameTable(ends | in_layers(config.n_layer, layer, "gpt_neox.layers.{}."), unused)
