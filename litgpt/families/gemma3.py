"""Gemma 3 with vision: its text part."""

from dataclasses import replace

from litgpt.families import gemma3_text
from litgpt.families.common import only
from litgpt.families.container import container
from litgpt.families.family import ENDS, MTP
from litgpt.families.table import Aliases

TEXT = gemma3_text.FAMILY
FAMILY = container(
    replace(TEXT, rows=[*TEXT.rows, only("final_logit_softcapping", None)]),  # for transformers it is of TEXT alone
    "gemma3_text",
    alone="gemma3_text",
    architecture="Gemma3ForConditionalGeneration",
    tied=True,
    ends={ours: f"language_model.{hf}" for ours, hf in ENDS.items()},
    prefix="language_model.model.layers.{}.",
    kept=rf"^(vision_tower|multi_modal_projector)\.|{MTP}",
    aliases=Aliases(
        renames=[
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        ],
        memory=[(r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\b", "lm_head")],
    ),
)
