"""`litgpt finetune adapter`"""

from functools import partial
from pathlib import Path
from typing import Any

from litgpt.methods.adapter import LLaMAAdapter
from litgpt.methods.adapter_folder import write_adapter
from litgpt.model.gpt import GPT
from litgpt.train.base_model import BaseModel
from litgpt.train.learning_rate import default_learning_rate
from litgpt.train.method import RESULT_COMMANDS, Method
from litgpt.train.run import Run

REMARK = "Other programs do not support this adapter, and it cannot be merged. For them, use LoRA."


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter"),
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    **kwargs: Any,
) -> None:
    """Finetune a model with LLaMA-Adapter: train a prefix for its later layers and freeze the rest.

    The result, `final/` in the output folder, is an adapter folder. Paper: https://arxiv.org/abs/2303.16199

    Args:
        checkpoint_dir: Model: a Hugging Face folder, or the name of one under checkpoints/.
        out_dir: Output folder; the result is in final/.
        adapter_prompt_length: Length of the prefix in tokens.
        adapter_start_layer: First layer with a prefix, counted from 0.
    """
    method = adapter_method("adapter", LLaMAAdapter(adapter_prompt_length, adapter_start_layer))
    Run(method, BaseModel.from_folder(checkpoint_dir, kwargs.get("dry_run", False)), out_dir, **kwargs)()


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
