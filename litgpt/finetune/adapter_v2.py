"""`litgpt finetune adapter_v2`"""

from pathlib import Path
from typing import Any

from litgpt.finetune.adapter import adapter_method
from litgpt.methods.adapter import LLaMAAdapterV2
from litgpt.train.base_model import BaseModel
from litgpt.train.run import Run


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter-v2"),
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    **kwargs: Any,
) -> None:
    """Finetune a model with LLaMA-Adapter V2: train prefixes, the norms, and a bias and a scale per linear layer.

    The result, `final/` in the output folder, is an adapter folder. Paper: https://arxiv.org/abs/2304.15010

    Args:
        checkpoint_dir: Model: a Hugging Face folder, or the name of one under checkpoints/.
        out_dir: Output folder; the result is in final/.
        adapter_prompt_length: Length of the prefix in tokens.
        adapter_start_layer: First layer with a prefix, counted from 0.
    """
    method = adapter_method("adapter_v2", LLaMAAdapterV2(adapter_prompt_length, adapter_start_layer))
    Run(method, BaseModel.from_folder(checkpoint_dir, kwargs.get("dry_run", False)), out_dir, **kwargs)()
