"""OLMo 3: OLMo 2 with a window in three of four layers, and a scaled rope in the global ones alone."""

from typing import Any

from litgpt.families.common import read_two_ropes, sizes, whole_rope, windows
from litgpt.families.family import Family, Part
from litgpt.families.olmo2 import ROWS, RULES, SWITCHES
from litgpt.model.config import Config


def write_ropes(config: Config) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    return {"rope_parameters": {"full_attention": whole_rope(config), "sliding_attention": local}}


FAMILY = Family(
    "Olmo3ForCausalLM",
    [
        *sizes(always=False),
        windows(every=4, two_ropes=True),
        *ROWS,
        Part(lambda fields: read_two_ropes(fields, 500000.0, 500000.0), write_ropes),  # `rope_theta` is for global ones
    ],
    SWITCHES,
    layer=RULES,
)
