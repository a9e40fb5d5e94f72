"""Gemma 4 with vision and audio: its text part."""

from litgpt.families import gemma4_text
from litgpt.families.container import container

NAMES = {
    "ends": gemma4_text.ends("model.language_model"),
    "prefix": "model.language_model.layers.{}.",
    "kept": r"^model\.(vision_tower|vision_embedder|embed_vision|audio_tower|embed_audio)\.",
}
FAMILY = container(
    gemma4_text.FAMILY,
    "gemma4_text",
    alone="gemma4_text",
    architecture="Gemma4ForConditionalGeneration",
    tied=True,
    **NAMES,
)
