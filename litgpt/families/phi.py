"""Phi-1, 1.5 and 2: parallel residuals on one LayerNorm, biases everywhere, partial rotary embedding
(https://arxiv.org/abs/2309.05463)."""

from litgpt.families.common import gelu, rope, sizes
from litgpt.families.family import ENDS, Family

FAMILY = Family(
    "PhiForCausalLM",
    [
        *sizes(always=False),
        rope(partial=0.5),
        gelu("hidden_act", "gelu_new"),
        ("layer_norm_eps", "norm_eps", 1e-5),
        ("qk_layernorm", "norm_qk", False),
    ],
    switches={
        "norm_class_name": "LayerNorm",
        "parallel_residual": True,
        "shared_attention_norm": True,
        "bias": True,
        "lm_head_bias": True,
    },
    layer={
        "norm_1": "input_layernorm",
        "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.norm_q": "self_attn.q_layernorm",
        "attn.norm_k": "self_attn.k_layernorm",
        "attn.proj": "self_attn.dense",
        "mlp.fc": "mlp.fc1",
        "mlp.proj": "mlp.fc2",
    },
    ends={**ENDS, "transformer.ln_f": "model.final_layernorm"},
)
