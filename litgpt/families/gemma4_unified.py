"""Gemma 4 12B with vision and audio: its text part."""

from litgpt.families import gemma4_text
from litgpt.families.container import container
from litgpt.families.gemma4 import NAMES
from litgpt.families.table import Aliases

FAMILY = container(
    gemma4_text.UNIFIED,
    "gemma4_unified_text",
    alone="gemma4_unified_text",
    architecture="Gemma4UnifiedForConditionalGeneration",
    tied=True,
    **NAMES,
    aliases=Aliases(
        renames=[
            (r"^model\.embed_vision\.(patch_|pos_)", r"model.vision_embedder.\1"),
            (r"^model\.embed_vision\.multimodal_embedder\.", "model.embed_vision."),
        ],
        memory=[
            (r"^model\.embed_vision\.(?=embedding_projection)", "model.embed_vision.multimodal_embedder."),
            (r"^model\.vision_embedder\.", "model.embed_vision."),
        ],
    ),
)
