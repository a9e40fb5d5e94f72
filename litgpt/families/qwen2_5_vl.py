"""Qwen2.5-VL: its text part, which is a Qwen2 (https://arxiv.org/abs/2502.13923)."""

from dataclasses import replace
from typing import Any

from litgpt.families import qwen2
from litgpt.families.common import as_object, gate, late_windows, only, rope_of_text, sizes, whole_heads
from litgpt.families.container import TIED, container
from litgpt.families.family import MTP, Part, flag
from litgpt.families.table import Aliases

TEXT = replace(
    qwen2.FAMILY,
    rows=[
        *sizes(kv_heads=8, always=False),
        only("head_dim", None),
        whole_heads("hidden_size", "num_attention_heads"),
        rope_of_text(base=1000000.0),
        late_windows(),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-5),
    ],
    defaults={
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "max_position_embeddings": 32768,
        "max_window_layers": 80,
    },
)
INNER = container(
    TEXT,
    "qwen2_5_vl_text",
    alone="qwen2",
    architecture="Qwen2_5_VLForConditionalGeneration",
    kept=rf"^visual\.|{MTP}",
    aliases=Aliases(
        renames=[(r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")],
        memory=[(r"^model\.", "model.language_model.")],
    ),
)


def nested(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with those of the text model in `text_config`, beside which released files have them. Either place may
    say that the head is the embedding."""
    inner = as_object(fields.get("text_config"), "text_config")
    inner = inner or {key: value for key, value in fields.items() if key != "model_type"}
    tied = {TIED: flag(fields, TIED) or flag(inner, TIED)}
    return {"text_config": inner | tied, **tied}


(PART,) = INNER.parts
FAMILY = replace(INNER, rows=[Part(lambda fields: PART.read(nested(fields)), PART.write)])
