"""`litgpt finetune lora`"""

from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

from litgpt.errors import remark as say
from litgpt.methods.lora import Init, LoRA, Variant
from litgpt.methods.peft_export import write_lora
from litgpt.model import GPT
from litgpt.train.base_model import BaseModel
from litgpt.train.method import ADAPTER_COMMANDS, Method
from litgpt.train.run import run


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    lora_r: int = 8,
    lora_alpha: Union[int, float] = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    lora_targets: Optional[str] = None,
    lora_layers: Optional[list[int]] = None,
    lora_variant: Variant = "lora",
    lora_init: Init = "kaiming",
    lora_plus_ratio: float = 1.0,
    train_embeddings: bool = False,
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
        lora_targets: A regular expression for the Hugging Face names of the layers to update (q_proj|v_proj); instead
            of the six options above.
        lora_layers: Update only these blocks of the model, as [0, 1] or, from the end, [-2, -1].
        lora_variant: rslora scales by lora_alpha / sqrt(lora_r), which suits high ranks; dora learns the norms of the
            weights' rows as well.
        lora_init: pissa starts the updates with the principal part of each weight instead of with nothing.
        lora_plus_ratio: The learning rate of the second factor of each update, as a multiple of the first's (LoRA+).
        train_embeddings: Train the embedding in full too, for new tokens or a new language.
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
        targets=lora_targets,
        layers=lora_layers,
        variant=lora_variant,
        init=lora_init,
        plus_ratio=lora_plus_ratio,
        train_embeddings=train_embeddings,
    )
    if lora_targets is not None and (idle := lora.idle_switches()):
        say(f"--lora_targets says what is updated, so {', '.join(idle)} has no effect.")
    commands = ("litgpt merge_lora {final}", *ADAPTER_COMMANDS)
    special = [*(["DoRA"] if lora_variant == "dora" else []), *(["trained embeddings"] if train_embeddings else [])]
    remark = f"vLLM and llama.cpp do not take {' and '.join(special)}: merge first." if special else ""
    method = Method("finetune lora", lora.apply, partial(save, lora), next_commands=commands, remark=remark)
    run(method, BaseModel.from_folder(checkpoint_dir), out_dir, **kwargs)


def save(lora: LoRA, model: GPT, start: BaseModel, folder: Path) -> None:
    write_lora(lora, model, start.base, folder)
