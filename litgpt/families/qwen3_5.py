"""Qwen3.5: its text part."""

from typing import Any

from litgpt.families import qwen3_5_text
from litgpt.families.container import container
from litgpt.families.family import ENDS, MTP
from litgpt.families.table import Aliases

NAMES: dict[str, Any] = {
    "ends": ENDS | {ours: hf.replace("model.", "model.language_model.") for ours, hf in ENDS.items()},
    "prefix": "model.language_model.layers.{}.",
    "kept": rf"^model\.visual\.|{MTP}",
}
FAMILY = container(
    qwen3_5_text.FAMILY,
    "qwen3_5_text",
    alone="qwen3_5_text",
    architecture="Qwen3_5ForConditionalGeneration",
    **NAMES,
    aliases=Aliases(),
)
