"""StarCoder2: LayerNorms, biases everywhere, GELU without a gate (https://arxiv.org/abs/2402.19173)."""

from litgpt.families.common import WINDOW, gelu, only, rope, sizes
from litgpt.families.family import LAYER, Family

FAMILY = Family(
    "Starcoder2ForCausalLM",
    [
        *sizes(kv_heads=2, tied=True, always=False),
        rope(),
        gelu("hidden_act", "gelu_pytorch_tanh"),
        ("norm_epsilon", "norm_eps", 1e-5),
        ("use_bias", "attn_bias attn_proj_bias mlp_bias", True),
        WINDOW,
        only("layer_types", None),
    ],
    switches={"norm_class_name": "LayerNorm"},
    layer={**LAYER, "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"},
)
