"""Models with parts for images beside a text model. Those are not read, but copied when the model is written."""

from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import as_object
from litgpt.families.family import MTP, Family, Part, flag

TIED = "tie_word_embeddings"
QWEN: dict[str, Any] = {  # the names of the weights of Qwen's containers, from Qwen3-VL on
    "ends": {
        "transformer.wte": "model.language_model.embed_tokens",
        "transformer.ln_f": "model.language_model.norm",
        "lm_head": "lm_head",
    },
    "prefix": "model.language_model.layers.{}.",
    "kept": rf"^model\.visual\.|{MTP}",
}


def container(text: Family, name: str, alone: str, architecture: str, tied: bool = False, **names: Any) -> Family:
    """A family whose text model is of another family.

    Args:
        text: The family of the text model.
        name: The `model_type` of `text_config`.
        alone: The `model_type` that is written, since there are no other parts to go with the text model.
        architecture: The class in `transformers` of the whole.
        tied: Whether the head is the embedding by default.
        names: Fields of `Family` that tell the names of the weights.
    """

    def read(fields: dict[str, Any]) -> dict[str, Any]:
        inner = as_object(fields.get("text_config"), "text_config")
        if inner.get("model_type", name) != name:
            raise UserError(f"config.json has a text_config that is not of model_type {name!r}.")
        is_tied = flag(fields, TIED, tied)
        if TIED in inner and flag(inner, TIED) != is_tied:
            raise UserError(f"config.json has {TIED} {is_tied}, and the opposite in text_config.")
        return text.read(inner | {TIED: is_tied})

    rows = [Part(read, lambda config: text.write(config) | {"model_type": alone})]
    return replace(text, architecture=architecture, rows=rows, switches={}, defaults={}, **names)
