"""Qwen3.5: its text part."""

from litgpt.families import qwen3_5_text
from litgpt.families.container import container
from litgpt.families.family import ENDS, MTP

ENDS_OF_TEXT = ENDS | {ours: hf.replace("model.", "model.language_model.") for ours, hf in ENDS.items()}
FAMILY = container(
    qwen3_5_text.FAMILY,
    "qwen3_5_text",
    alone="qwen3_5_text",
    architecture="Qwen3_5ForConditionalGeneration",
    ends=ENDS_OF_TEXT,
    prefix="model.language_model.layers.{}.",
    kept=rf"^model\.visual\.|{MTP}",
)
