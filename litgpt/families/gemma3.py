"""Gemma 3 with vision: its text part. What belongs to vision is not read, and is carried over as it is."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families import gemma3_text
from litgpt.families.common import flag, require_value
from litgpt.families.llama import ENDS
from litgpt.families.table import Aliases, NameTable, in_layers
from litgpt.model.config import Config

ALIASES = Aliases(
    renames=[
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    ],
    memory=[(r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\b", "lm_head")],
)


def read_config(fields: dict[str, Any]) -> Config:
    text = fields.get("text_config") or {}
    if not isinstance(text, dict) or text.get("model_type", "gemma3_text") != "gemma3_text":
        raise UserError("config.json has a text_config that is not of model_type 'gemma3_text'.")
    tied = flag(fields, "tie_word_embeddings", True)
    if "tie_word_embeddings" in text and flag(text, "tie_word_embeddings") != tied:
        raise UserError(f"config.json has tie_word_embeddings {tied}, and the contrary in text_config.")
    require_value(text, "final_logit_softcapping", None)  # transformers uses it in the text model alone
    return gemma3_text.read_config(text | {"tie_word_embeddings": tied})


def write_config(config: Config) -> dict[str, Any]:
    """The text model by itself: there is no vision part to go with it."""
    return gemma3_text.write_config(config) | {"model_type": "gemma3_text"}


def name_table(config: Config) -> NameTable:
    ends = {ours: f"language_model.{hf}" for ours, hf in ENDS.items()}
    layers = in_layers(config.n_layer, gemma3_text.LAYER, "language_model.model.layers.{}.")
    return NameTable(ends | layers, kept=r"^(vision_tower|multi_modal_projector)\.")
