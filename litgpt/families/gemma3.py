"""Gemma 3 with vision: its text part. The vision part is not read, but copied when the model is written."""

from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families import gemma3_text
from litgpt.families.family import ENDS, MTP, Part, flag, require_value
from litgpt.families.table import Aliases
from litgpt.model.config import Config

TEXT = gemma3_text.FAMILY


def read_text(fields: dict[str, Any]) -> dict[str, Any]:
    text = fields.get("text_config") or {}
    if not isinstance(text, dict) or text.get("model_type", "gemma3_text") != "gemma3_text":
        raise UserError("config.json has a text_config that is not of model_type 'gemma3_text'.")
    tied = flag(fields, "tie_word_embeddings", True)
    if "tie_word_embeddings" in text and flag(text, "tie_word_embeddings") != tied:
        raise UserError(f"config.json has tie_word_embeddings {tied}, and the opposite in text_config.")
    require_value(text, "final_logit_softcapping", None)  # transformers uses it in the text model alone
    return TEXT.read(text | {"tie_word_embeddings": tied})


def write_text(config: Config) -> dict[str, Any]:
    """The text model by itself, because there is no vision part to go with it."""
    return TEXT.write(config) | {"model_type": "gemma3_text"}


FAMILY = replace(
    TEXT,
    rows=[Part(read_text, write_text)],
    switches={},
    defaults={},
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
