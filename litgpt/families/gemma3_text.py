"""Gemma 3 without vision: five local layers to a global one, each kind with its rope
(https://arxiv.org/abs/2503.19786)."""

from litgpt.families.common import only, read_two_ropes, rope, sizes, windows
from litgpt.families.family import QK_NORMS, Family, Part
from litgpt.families.gemma2 import BLOCK, FOUR_NORMS, FOUR_NORMS_SWITCHES, SCALAR

FAMILY = Family(
    "Gemma3ForCausalLM",
    [
        *sizes(kv_heads=4, head_dim=256, tied=True),
        Part(lambda fields: read_two_ropes(fields, 1000000.0, 10000.0, "rope_local_base_freq"), rope().write),
        windows(every=6, key="sliding_window_pattern", two_ropes=True),
        *BLOCK,
        Part(write=lambda config: {"rope_local_base_freq": config.rope_local_base_freq}),
        SCALAR,
        only("attn_logit_softcapping", None),  # transformers has the field and does not use it
        ("final_logit_softcapping", "final_logit_softcapping", None),
    ],
    {**FOUR_NORMS_SWITCHES, "norm_qk": True},
    defaults={  # of transformers; released files rely on them
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
    },
    layer={**FOUR_NORMS, **QK_NORMS},
)
