"""Hunyuan: Llama with norms of queries and keys after the rope."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import ATTENTION_BIAS, gate, is_positive, only, rope, rope_numbers, sizes
from litgpt.families.family import LAYER, Family, Part, integer

ROPE = rope()


def read_alpha(fields: dict[str, Any]) -> dict[str, Any]:
    """The rope, with `alpha` in the base. Its type is called dynamic, but it does not depend on the length of a text,
    and `transformers` reads no other number beside `alpha`."""
    key, numbers = rope_numbers(fields)
    if numbers.get("rope_type", numbers.get("type")) != "dynamic" or numbers.get("alpha") is None:
        return ROPE.read(fields)
    alpha, size = numbers["alpha"], integer(fields, "head_dim")
    if not is_positive(alpha) or size < 4:
        raise UserError(f"config.json has alpha {alpha!r} in {key}. Expected a number above 0, and a head_dim above 2.")
    plain = {"rope_theta": numbers["rope_theta"]} if "rope_theta" in numbers else {}
    found = ROPE.read({k: v for k, v in fields.items() if k != "rope_scaling"} | {"rope_parameters": plain})
    return found | {"rope_base": found["rope_base"] * alpha ** (size / (size - 2))}


FAMILY = Family(
    "HunYuanDenseV1ForCausalLM",
    [
        *sizes(),
        Part(read_alpha, ROPE.write),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-5),
        ATTENTION_BIAS,
        only("use_qk_norm", True),  # transformers has neither field; early files do
        only("use_cla", False),
    ],
    switches={"norm_qk": True, "norm_qk_after_rope": True},
    layer={**LAYER, "attn.norm_q": "self_attn.query_layernorm", "attn.norm_k": "self_attn.key_layernorm"},
)
