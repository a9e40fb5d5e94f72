"""GPT-NeoX: Pythia, StableLM Alpha. Parallel residuals, LayerNorm, partial rotary embedding
(https://arxiv.org/abs/2204.06745)."""

from litgpt.families.common import gelu, only, rope
from litgpt.families.family import Family
from litgpt.families.table import Aliases, Rules, Stored, rows_by_group
from litgpt.model.config import Config


def layer(config: Config) -> Rules:
    rows = rows_by_group(config.n_head, config.n_head, config.head_size)
    return {
        "norm_1": "input_layernorm",
        "attn.qkv": Stored("attention.query_key_value", rows),
        "attn.proj": "attention.dense",
        "norm_2": "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    }


FAMILY = Family(
    "GPTNeoXForCausalLM",
    [
        ("vocab_size", "padded_vocab_size"),
        ("hidden_size", "n_embd"),
        ("intermediate_size", "intermediate_size"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("max_position_embeddings", "block_size"),
        ("tie_word_embeddings", "tie_embeddings", False),
        only("partial_rotary_factor", None),
        rope(partial=0.25, base_key="rotary_emb_base", partial_key="rotary_pct"),
        gelu("hidden_act", "gelu"),
        ("layer_norm_eps", "norm_eps", 1e-5),
        ("use_parallel_residual", "parallel_residual", True),
        ("attention_bias", "attn_bias attn_proj_bias", True),
    ],
    switches={"norm_class_name": "LayerNorm", "mlp_bias": True},
    layer=layer,
    ends={
        "transformer.wte": "gpt_neox.embed_in",
        "transformer.ln_f": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
    prefix="gpt_neox.layers.{}.",
    unused=r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$",
    aliases=Aliases(renames=[(r"^lm_head\.", "embed_out.")], memory=[(r"^embed_out\b", "lm_head")]),
)
