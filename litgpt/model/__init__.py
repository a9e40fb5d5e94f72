"""The model, in torch alone."""

from litgpt.model import kernels_cpu as kernels_cpu  # registers its kernels
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache

__all__ = ["GPT", "KVCache"]
