"""GPT-2: learned positions, LayerNorm, transposed weights (https://github.com/openai/gpt-2)."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import epsilon, flag, gelu, require_value, whole
from litgpt.families.table import Aliases, HFModules, NameTable, Rules, Stored, in_layers
from litgpt.model.config import Config

LAYER: Rules = {
    "norm_1": "ln_1",
    "attn.qkv": Stored("attn.c_attn", transposed=True),
    "attn.proj": Stored("attn.c_proj", transposed=True),
    "norm_2": "ln_2",
    "mlp.fc": Stored("mlp.c_fc", transposed=True),
    "mlp.proj": Stored("mlp.c_proj", transposed=True),
}
ALIASES = Aliases(renames=[(r"^(h|wte|wpe|ln_f)\.", r"transformer.\1.")])  # as the first files have them


def read_config(fields: dict[str, Any]) -> Config:
    require_value(fields, "scale_attn_by_inverse_layer_idx", False)
    require_value(fields, "add_cross_attention", False)
    n_embd, n_head = whole(fields, "n_embd"), whole(fields, "n_head")
    if n_embd % n_head:
        raise UserError(f"config.json has n_embd {n_embd} for {n_head} heads: no multiple.")
    return Config(
        block_size=whole(fields, "n_positions", 1024),
        padded_vocab_size=whole(fields, "vocab_size"),
        n_layer=whole(fields, "n_layer"),
        n_embd=n_embd,
        n_head=n_head,
        intermediate_size=whole(fields, "n_inner", 4 * n_embd),
        norm_class_name="LayerNorm",
        norm_eps=epsilon(fields, "layer_norm_epsilon", 1e-5),
        learned_positions=True,
        rotary_percentage=0.0,
        attention_scores_scalar=None if flag(fields, "scale_attn_weights", True) else 1.0,
        bias=True,
        mlp_class_name="GptNeoxMLP",
        gelu_approximate=gelu(fields, "activation_function", "gelu_new"),
        tie_embeddings=flag(fields, "tie_word_embeddings", True),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.padded_vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.intermediate_size,
        "activation_function": "gelu_new" if config.gelu_approximate == "tanh" else "gelu",
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scores_scalar != 1,
        "tie_word_embeddings": config.tie_embeddings,
    }


def name_table(config: Config) -> NameTable:
    ends: dict[str, HFModules] = {
        "transformer.wte": "transformer.wte",
        "transformer.wpe": "transformer.wpe",
        "transformer.ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    }
    return NameTable(ends | in_layers(config.n_layer, LAYER, "transformer.h.{}."), unused=r"\.attn\.(masked_)?bias$")
