"""`litgpt finetune adapter_v2`"""

from pathlib import Path
from typing import Any

from litgpt.finetune.adapter import adapter_method
from litgpt.methods.adapter_v2 import LLaMAAdapterV2
from litgpt.train.base_model import BaseModel
from litgpt.train.run import run


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter-v2"),
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    **kwargs: Any,
) -> None:
    """Finetune a model with LLaMA-Adapter V2: prefixes, a bias and a scale on each linear layer, and the norms.

    The result, `final/` in the output folder, is an adapter folder. Paper: https://arxiv.org/abs/2304.15010

    Args:
        checkpoint_dir: The model: a Hugging Face folder, or the name of one under checkpoints/.
        out_dir: Where everything is written; final/ in it is the result.
        adapter_prompt_length: The length of the prefix, in tokens.
        adapter_start_layer: The first layer that gets a prefix, counted from 0.
    """
    adapter = LLaMAAdapterV2(adapter_prompt_length, adapter_start_layer)
    run(adapter_method("finetune adapter_v2", adapter), BaseModel.from_folder(checkpoint_dir), out_dir, **kwargs)
