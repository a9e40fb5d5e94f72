"""Phi-3, Phi-3.5, Phi-4: Llama with fused weights, longrope and partial rotary embedding
(https://arxiv.org/abs/2404.14219)."""

from typing import Any

from litgpt.families.common import LENGTH, WINDOW, gate, rope, rope_numbers, sizes
from litgpt.families.family import LAYER, Family, Part

ROPE = rope(partial=1.0, types=("default", "longrope"))


def read_longrope(fields: dict[str, Any]) -> dict[str, Any]:
    key, numbers = rope_numbers(fields)
    if numbers.get("rope_type", numbers.get("type")) in ("su", "yarn"):  # earlier names of longrope
        numbers["rope_type"] = "longrope"
    return ROPE.read(fields | {key: numbers})


FAMILY = Family(
    "Phi3ForCausalLM",
    [
        *sizes(always=False),
        Part(read_longrope, lambda c: ROPE.write(c) | {LENGTH: c.rope_adjustments.get(LENGTH, c.block_size)}),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-5),
        WINDOW,
        Part(write=lambda config: {"pad_token_id": None}),  # the default of transformers may exceed the vocabulary
    ],
    defaults={LENGTH: 4096},
    layer={**LAYER, "attn.qkv": "self_attn.qkv_proj", "mlp.fc": "mlp.gate_up_proj"},
)
