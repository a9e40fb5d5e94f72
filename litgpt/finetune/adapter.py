"""`litgpt finetune adapter`"""

from functools import partial
from pathlib import Path
from typing import Any, Optional

from litgpt.finetune.initial import continued_adapter
from litgpt.methods.adapter import LLaMAAdapter
from litgpt.methods.adapter_folder import write_adapter
from litgpt.model.gpt import GPT
from litgpt.train.base_model import BaseModel
from litgpt.train.learning_rate import default_learning_rate
from litgpt.train.method import RESULT_COMMANDS, Method
from litgpt.train.result import TrainingResult
from litgpt.train.run import Run

REMARK = "Other programs do not support this adapter, and it cannot be merged. For them, use LoRA."


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter"),
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    initial_adapter: Optional[Path] = None,
    **kwargs: Any,
) -> Optional[TrainingResult]:
    """Finetune a model with LLaMA-Adapter: train a prefix for its later layers and freeze the rest.

    The result, `final/` in the output folder, is an adapter folder. Paper: https://arxiv.org/abs/2303.16199

    Args:
        checkpoint_dir: Model: a Hugging Face folder, or the name of one under checkpoints/; or an adapter folder, whose
            training continues with a new schedule.
        out_dir: Output folder; the result is in final/.
        adapter_prompt_length: Length of the prefix in tokens.
        adapter_start_layer: First layer with a prefix, counted from 0.
        initial_adapter: Adapter folder whose training continues with a new schedule, if the model is its base. Not
            needed if the model is an adapter folder that names its base.
    """
    base_model = BaseModel.from_folder(checkpoint_dir, initial_adapter, kwargs.get("dry_run", False))
    adapter = continued_adapter(LLaMAAdapter(adapter_prompt_length, adapter_start_layer), base_model)
    return Run(adapter_method("adapter", adapter), base_model, out_dir, **kwargs)()


def adapter_method(name: str, adapter: LLaMAAdapter) -> Method:
    return Method(
        name=f"finetune {name}",
        apply=adapter.apply,
        save=partial(save, adapter),
        next_commands=RESULT_COMMANDS,
        remark=REMARK,
        learning_rate=partial(default_learning_rate, name),
    )


def save(adapter: LLaMAAdapter, model: GPT, base_model: BaseModel, folder: Path) -> None:
    write_adapter(adapter, model, base_model.base, folder)
