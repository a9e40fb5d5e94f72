"""Mistral Small 3.1 and Ministral 3 with vision: the text part, which is of `mistral` or `ministral3`. The vision part
is not read, but copied when the model is written."""

from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families import gemma3, ministral3, mistral
from litgpt.families.family import LAYER, Part, flag
from litgpt.model.config import Config

TEXTS = {"mistral": mistral.FAMILY, "ministral3": ministral3.FAMILY}

SMALL = {  # the text part of a file without one: that of Mistral Small 3.1
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000000.0,
    "sliding_window": None,
}


def read_text(fields: dict[str, Any]) -> dict[str, Any]:
    text = fields.get("text_config", SMALL)
    if not isinstance(text, dict) or text.get("model_type", "mistral") not in TEXTS:
        raise UserError(f"config.json has no text_config of model_type {' or '.join(map(repr, TEXTS))}.")
    tied = flag(fields, "tie_word_embeddings", True)  # that of the text part has no effect
    return TEXTS[text.get("model_type", "mistral")].read(text | {"tie_word_embeddings": tied})


def write_text(config: Config) -> dict[str, Any]:
    """The text model by itself, because there is no vision part to go with it."""
    model_type = "ministral3" if config.query_scale else "mistral"
    return TEXTS[model_type].write(config) | {"model_type": model_type}


FAMILY = replace(gemma3.FAMILY, rows=[Part(read_text, write_text)], layer=LAYER)
