"""`litgpt finetune adapter`"""

from functools import partial
from pathlib import Path
from typing import Any

from litgpt.methods.adapter import LLaMAAdapter
from litgpt.methods.adapter_folder import write_adapter
from litgpt.model import GPT
from litgpt.train.base_model import BaseModel
from litgpt.train.method import ADAPTER_COMMANDS, Method
from litgpt.train.run import run

REMARK = "Other programs do not know this kind of adapter, and it cannot be merged: use LoRA for them."


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter"),
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
    **kwargs: Any,
) -> None:
    """Finetune a model with LLaMA-Adapter: the model is frozen, and a prefix that its later layers see is learned.

    The result, `final/` in the output folder, is an adapter folder. Paper: https://arxiv.org/abs/2303.16199

    Args:
        checkpoint_dir: The model: a Hugging Face folder, or the name of one under checkpoints/.
        out_dir: Where everything is written; final/ in it is the result.
        adapter_prompt_length: The length of the prefix, in tokens.
        adapter_start_layer: The first layer that gets a prefix, counted from 0.
    """
    adapter = LLaMAAdapter(adapter_prompt_length, adapter_start_layer)
    run(adapter_method("finetune adapter", adapter), BaseModel.from_folder(checkpoint_dir), out_dir, **kwargs)


def adapter_method(name: str, adapter: LLaMAAdapter) -> Method:
    return Method(name, adapter.apply, partial(save, adapter), next_commands=ADAPTER_COMMANDS, remark=REMARK)


def save(adapter: LLaMAAdapter, model: GPT, start: BaseModel, folder: Path) -> None:
    write_adapter(adapter, model, start.base, folder)
