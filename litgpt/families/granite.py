"""Granite: Llama with a multiplier for the embedding, the residuals, the scores and the logits."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families import llama
from litgpt.families.common import number
from litgpt.families.llama import name_table as name_table
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    config = llama.read_config(fields)
    scores = float(number(fields, "attention_multiplier", 1.0))
    if scores <= 0:
        raise UserError(f"config.json has attention_multiplier {scores}; a number above 0 is wanted.")
    config.attention_scores_scalar = scores**-2
    config.embedding_multiplier = float(number(fields, "embedding_multiplier", 1.0))
    config.residual_multiplier = float(number(fields, "residual_multiplier", 1.0))
    config.logits_scaling = float(number(fields, "logits_scaling", 1.0))
    if config.logits_scaling == 0:
        raise UserError("config.json has logits_scaling 0; another number is wanted.")
    return config


def write_config(config: Config) -> dict[str, Any]:
    return llama.write_config(config) | {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": (config.attention_scores_scalar or config.head_size or 1) ** -0.5,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
    }
