"""The model, in torch alone."""

from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache

__all__ = ["GPT", "KVCache"]
