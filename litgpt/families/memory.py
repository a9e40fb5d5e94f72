"""The names that modules have in memory, in transformers 5, where they differ from those in its files.

Adapters go by the names in memory. Names that a program has in memory are read through the family's `ALIASES`.
"""

import re

IN_MEMORY = {  # model_type: pattern and replacement for each, in the manner of `re.sub`
    "gemma3": [(r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\b", "lm_head")],
    "gpt_neox": [(r"^embed_out\b", "lm_head")],
    "mixtral": [(r"\.block_sparse_moe\.", ".mlp.")],
}


def in_memory(model_type: str, module: str) -> str:
    """The name in memory of a module of the family's table."""
    for pattern, replacement in IN_MEMORY.get(model_type, ()):
        module = re.sub(pattern, replacement, module)
    return module
