"""GPT-2: learned positions, LayerNorm, transposed weights (https://github.com/openai/gpt-2)."""

from litgpt.families.common import gelu, only, whole_heads
from litgpt.families.family import Family, Part, flag
from litgpt.families.table import Aliases, Stored

FAMILY = Family(
    "GPT2LMHeadModel",
    [
        ("vocab_size", "padded_vocab_size"),
        ("n_positions", "block_size", 1024),
        ("n_embd", "n_embd"),
        ("n_layer", "n_layer"),
        ("n_head", "n_head"),
        whole_heads("n_embd", "n_head"),
        ("n_inner", "intermediate_size", None),
        gelu("activation_function", "gelu_new", tanh="gelu_new"),
        ("layer_norm_epsilon", "norm_eps", 1e-5),
        Part(
            lambda fields: {"attention_scores_scalar": None if flag(fields, "scale_attn_weights", True) else 1.0},
            lambda config: {"scale_attn_weights": config.attention_scores_scalar != 1},
        ),
        ("tie_word_embeddings", "tie_embeddings", True),
        only("scale_attn_by_inverse_layer_idx", False),
        only("add_cross_attention", False),
    ],
    switches={"norm_class_name": "LayerNorm", "learned_positions": True, "rotary_percentage": 0.0, "bias": True},
    layer={
        "norm_1": "ln_1",
        "attn.qkv": Stored("attn.c_attn", transposed=True),
        "attn.proj": Stored("attn.c_proj", transposed=True),
        "norm_2": "ln_2",
        "mlp.fc": Stored("mlp.c_fc", transposed=True),
        "mlp.proj": Stored("mlp.c_proj", transposed=True),
    },
    ends={name: name for name in ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")},
    prefix="transformer.h.{}.",
    unused=r"\.attn\.(masked_)?bias$",
    aliases=Aliases(renames=[(r"^(h|wte|wpe|ln_f)\.", r"transformer.\1.")]),  # the names in the first files
)
