"""`litgpt finetune adapter_v2`"""

from pathlib import Path
from typing import Any, Optional

from litgpt.finetune.adapter import adapter_method
from litgpt.finetune.initial import continued_adapter
from litgpt.methods.adapter import LLaMAAdapterV2
from litgpt.train.base_model import BaseModel
from litgpt.train.run import Run


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter-v2"),
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    initial_adapter: Optional[Path] = None,
    **kwargs: Any,
) -> None:
    """Finetune a model with LLaMA-Adapter V2: train prefixes, the norms, and a bias and a scale per linear layer.

    The result, `final/` in the output folder, is an adapter folder. Paper: https://arxiv.org/abs/2304.15010

    Args:
        checkpoint_dir: Model: a Hugging Face folder, or the name of one under checkpoints/; or an adapter folder, whose
            training continues with a new schedule.
        out_dir: Output folder; the result is in final/.
        adapter_prompt_length: Length of the prefix in tokens.
        adapter_start_layer: First layer with a prefix, counted from 0.
        initial_adapter: Adapter folder whose training continues with a new schedule, if the model is its base. Not
            needed if the model is an adapter folder that names its base.
    """
    base_model = BaseModel.from_folder(checkpoint_dir, kwargs.get("dry_run", False), initial_adapter)
    adapter = continued_adapter(LLaMAAdapterV2(adapter_prompt_length, adapter_start_layer), base_model)
    Run(adapter_method("finetune adapter_v2", adapter), base_model, out_dir, **kwargs)()
