"""`litgpt finetune full`"""

from functools import partial
from pathlib import Path
from typing import Any, Optional

from litgpt.checkpoint.folder import result_dtypes, round_weights, write_model
from litgpt.model.gpt import GPT
from litgpt.train.base_model import BaseModel
from litgpt.train.learning_rate import default_learning_rate
from litgpt.train.method import EXPORT_COMMAND, RESULT_COMMANDS, Method, Save
from litgpt.train.result import TrainingResult
from litgpt.train.run import Run


def setup(checkpoint_dir: Path, out_dir: Path = Path("out/finetune/full"), **kwargs: Any) -> Optional[TrainingResult]:
    """Finetune all weights of a model.

    The result, `final/` in the output folder, is a Hugging Face folder with the dtypes of the model.

    Args:
        checkpoint_dir: Model: a Hugging Face folder, or the name of one under checkpoints/; or a LoRA folder, which is
            merged in memory.
        out_dir: Output folder; the result is in final/.
    """
    base_model = BaseModel.from_folder(checkpoint_dir, planned=kwargs.get("dry_run", False)).merged()
    return Run(full_method(), base_model, out_dir, **kwargs)()


def full_method() -> Method:
    return Method(
        name="finetune full",
        apply=train_everything,
        save=save,
        finish=finish,
        next_commands=(*RESULT_COMMANDS, EXPORT_COMMAND),
        learning_rate=partial(default_learning_rate, "full"),
    )


def train_everything(model: GPT) -> None:
    model.requires_grad_(True)


def save(model: GPT, base_model: BaseModel, folder: Path, **options: Any) -> None:
    write_model(model, base_model.fields, folder, base_model.checkpoint, **options)


def finish(model: GPT, base_model: BaseModel) -> Save:
    """Round the weights to the dtypes of the base, in which the result is saved."""
    if base_model.checkpoint is None:
        return save
    dtypes = result_dtypes(model, base_model.checkpoint)
    round_weights(model, dtypes)
    return partial(save, dtypes=dtypes)
