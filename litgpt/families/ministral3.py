"""Ministral 3: Mistral with queries that grow with their position, as in Llama 4."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import LENGTH, WINDOW, gate, only, rope, rope_numbers, sizes, whole_rope
from litgpt.families.family import Family, Part, integer, number
from litgpt.model.config import Config

ROPE = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, LENGTH: 16384, "beta_fast": 32.0}
ROPE |= {"beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1}


def read_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """The rope, and beside it the scale of the queries. Its `max_position_embeddings` has no effect."""
    key, numbers = rope_numbers(fields)
    scale, _ = float(number(numbers, "llama_4_scaling_beta", 0.0)), numbers.pop("max_position_embeddings", None)
    length = integer(numbers, LENGTH, 0)
    if scale and not length:
        raise UserError(f"config.json has llama_4_scaling_beta in {key} without {LENGTH}.")
    plain = numbers.get("rope_type", numbers.get("type", "default")) == "default"
    unread = ("llama_4_scaling_beta", LENGTH) if plain else ("llama_4_scaling_beta",)
    found = rope().read(fields | {key: {k: v for k, v in numbers.items() if k not in unread}})
    return found | {"query_scale": scale, "query_scale_length": length}


def write_rope(config: Config) -> dict[str, Any]:
    scale = {"llama_4_scaling_beta": config.query_scale, LENGTH: config.query_scale_length or config.block_size}
    return {"rope_parameters": {**scale, **whole_rope(config)}}


FAMILY = Family(
    "Ministral3ForCausalLM",
    [
        *sizes(kv_heads=8, head_dim=128),
        Part(read_rope, write_rope),
        gate(),
        ("rms_norm_eps", "norm_eps", 1e-5),
        WINDOW,
        only("layer_types", None),
    ],
    defaults={"rope_parameters": ROPE},
)
