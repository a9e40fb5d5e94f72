"""`litgpt finetune lora`"""

from functools import partial
from pathlib import Path
from typing import Any

from litgpt.lora import LoRA
from litgpt.model import GPT
from litgpt.peft_folder import write_adapter
from litgpt.train.method import Method
from litgpt.train.run import run
from litgpt.train.start import Start


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    **kwargs: Any,
) -> None:
    """Finetune a model with LoRA: the model is frozen, and low-rank updates of its linear layers are learned.

    The result, `final/` in the output folder, is a PEFT adapter folder. Paper: https://arxiv.org/abs/2106.09685

    Args:
        checkpoint_dir: The model: a Hugging Face folder, or the name of one under checkpoints/.
        out_dir: Where everything is written; final/ in it is the result.
        lora_r: The rank of the updates.
        lora_alpha: The updates are scaled by lora_alpha / lora_r.
        lora_dropout: The share of its inputs that an update does not see in training.
        lora_query: Update the query projections.
        lora_key: Update the key projections.
        lora_value: Update the value projections.
        lora_projection: Update the projections after attention.
        lora_mlp: Update the linear layers of the MLPs.
        lora_head: Update the head.
    """
    lora = LoRA(
        r=lora_r,
        alpha=lora_alpha,
        dropout=lora_dropout,
        query=lora_query,
        key=lora_key,
        value=lora_value,
        projection=lora_projection,
        mlp=lora_mlp,
        head=lora_head,
    )
    next_commands = (
        'litgpt generate {final} --prompt "..."',
        "litgpt merge_lora {final}",
        "litgpt validate {final}",
    )
    method = Method("finetune lora", lora.apply, partial(save, lora), next_commands=next_commands)
    run(method, Start.from_folder(checkpoint_dir), out_dir, **kwargs)


def save(lora: LoRA, model: GPT, start: Start, folder: Path) -> None:
    write_adapter(lora, model, start.base, folder)
