"""Granite: Llama with a multiplier for the embedding, the residuals, the scores and the logits."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families import llama
from litgpt.families.family import Family, Part, number


def read_scores(fields: dict[str, Any]) -> dict[str, Any]:
    multiplier = float(number(fields, "attention_multiplier", 1.0))
    if multiplier <= 0:
        raise UserError(f"config.json has attention_multiplier {multiplier}. Expected a number above 0.")
    return {"attention_scores_scalar": multiplier**-2}


FAMILY = Family(
    "GraniteForCausalLM",
    [
        *llama.ROWS,
        Part(read_scores, lambda c: {"attention_multiplier": (c.attention_scores_scalar or c.head_size or 1) ** -0.5}),
        ("embedding_multiplier", "embedding_multiplier", 1.0),
        ("residual_multiplier", "residual_multiplier", 1.0),
        ("logits_scaling", "logits_scaling", 1.0),
    ],
)
