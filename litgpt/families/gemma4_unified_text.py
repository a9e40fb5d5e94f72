"""Gemma 4 12B without vision and audio: a Gemma 4 whose embeddings take raw inputs."""

from litgpt.families import gemma4_text

FAMILY = gemma4_text.UNIFIED
