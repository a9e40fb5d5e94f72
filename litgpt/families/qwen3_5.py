"""Qwen3.5: its text part."""

from litgpt.families import qwen3_5_text
from litgpt.families.container import QWEN, container
from litgpt.families.table import Aliases

FAMILY = container(
    qwen3_5_text.FAMILY,
    "qwen3_5_text",
    alone="qwen3_5_text",
    architecture="Qwen3_5ForConditionalGeneration",
    **QWEN,
    aliases=Aliases(),
)
