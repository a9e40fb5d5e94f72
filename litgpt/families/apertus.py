"""Apertus: xIELU without a gate, norms of queries and keys (https://arxiv.org/abs/2509.14233)."""

from litgpt.families.arcee import UNGATED
from litgpt.families.common import ATTENTION_BIAS, LENGTH, gelu, rope, sizes, whole_rope
from litgpt.families.family import QK_NORMS, Family, Part
from litgpt.families.table import Stored

ROPE = {"rope_type": "llama3", "factor": 8.0, LENGTH: 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILY = Family(
    "ApertusForCausalLM",
    [
        *sizes(always=False),
        Part(rope(base=12000000.0).read, lambda config: {"rope_parameters": whole_rope(config)}),
        gelu("hidden_act", "xielu"),
        ("rms_norm_eps", "norm_eps", 1e-5),
        ATTENTION_BIAS,
    ],
    switches={"norm_qk": True},
    defaults={"rope_parameters": ROPE},
    layer={
        **UNGATED,
        **QK_NORMS,
        "norm_1": "attention_layernorm",
        "norm_2": "feedforward_layernorm",
        **{f"mlp.act.{leaf}": f"mlp.act_fn.{leaf}" for leaf in ("alpha_p", "alpha_n")},
        **{f"mlp.act.{leaf}": Stored(f"mlp.act_fn.{leaf}", scalar=True) for leaf in ("beta", "eps")},
    },
)
