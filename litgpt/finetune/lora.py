"""`litgpt finetune lora`"""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

from litgpt.cli.groups import option_group
from litgpt.errors import remark
from litgpt.finetune.initial import continued_lora
from litgpt.methods.lora import LoRA
from litgpt.methods.peft_export import unloadable, write_lora
from litgpt.model.gpt import GPT
from litgpt.train.base_model import BaseModel
from litgpt.train.learning_rate import default_learning_rate
from litgpt.train.method import EXPORT_COMMAND, RESULT_COMMANDS, Method
from litgpt.train.result import TrainingResult
from litgpt.train.run import Run


@option_group("lora", LoRA, prefix="lora_")
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    lora: LoRA = LoRA(),  # noqa: B008
    train_embeddings: bool = False,
    initial_adapter: Optional[Path] = None,
    **kwargs: Any,
) -> Optional[TrainingResult]:
    """Finetune a model with LoRA: train low-rank updates of its linear layers and freeze the rest.

    The result, `final/` in the output folder, is a PEFT adapter folder. Paper: https://arxiv.org/abs/2106.09685

    Args:
        checkpoint_dir: Model: a Hugging Face folder, or the name of one under checkpoints/; or an adapter folder, whose
            training continues with a new schedule.
        out_dir: Output folder; the result is in final/.
        train_embeddings: Also train the embedding, for new tokens or a new language.
        initial_adapter: Adapter folder whose training continues with a new schedule, if the model is its base. Not
            needed if the model is an adapter folder that names its base.
    """
    base_model = BaseModel.from_folder(checkpoint_dir, initial_adapter, kwargs.get("dry_run", False))
    return Run(lora_method(lora, train_embeddings, base_model, out_dir), base_model, out_dir, **kwargs)()


def lora_method(lora: LoRA, train_embeddings: bool, base_model: BaseModel, out_dir: Path) -> Method:
    lora = continued_lora(replace(lora, train_embeddings=train_embeddings), base_model)
    if lora.targets is not None and (unused := lora.idle_switches()):
        remark(f"--lora_targets selects the layers; ignoring {', '.join(unused)}.")
    return Method(
        name="finetune lora",
        apply=lora.apply,
        save=partial(save, lora),
        next_commands=(*RESULT_COMMANDS, "litgpt merge_lora {folder}", EXPORT_COMMAND),
        notes=partial(notes, lora, out_dir),
        learning_rate=partial(default_learning_rate, "pissa" if lora.init == "pissa" else lora.variant),
    )


def notes(lora: LoRA, out_dir: Path, model: GPT) -> list[str]:
    if not (found := unloadable(lora, model)):
        return []
    final = shlex.quote(str(Path(out_dir) / "final"))
    return [
        f"vLLM and SGLang may refuse this adapter ({', '.join(found)}). Merge it for them: litgpt merge_lora {final}"
    ]


def save(lora: LoRA, model: GPT, base_model: BaseModel, folder: Path) -> None:
    write_lora(lora, model, base_model.base, folder)
