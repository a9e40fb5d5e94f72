"""Qwen3.5 with a mixture of experts: its text part."""

from dataclasses import replace

from litgpt.families import qwen3_5_moe_text, qwen3_moe
from litgpt.families.container import QWEN, container

FAMILY = container(
    qwen3_5_moe_text.FAMILY,
    "qwen3_5_moe_text",
    alone="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForConditionalGeneration",
    **QWEN,
    aliases=replace(qwen3_moe.ALIASES, in_peft=False),
)
