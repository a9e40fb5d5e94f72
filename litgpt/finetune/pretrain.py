"""`litgpt pretrain`"""

from pathlib import Path
from typing import Any, Optional, Union

from litgpt.checkpoint.find import find_folder
from litgpt.data.base import DataModule
from litgpt.errors import UserError
from litgpt.finetune.full import save, train_everything
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.base_model import BaseModel, model_fields
from litgpt.train.method import Method
from litgpt.train.run import Run

TRAIN = TrainArgs(global_batch_size=512, micro_batch_size=4, lr_warmup_steps=2000, epochs=1, max_norm=1.0, min_lr=4e-5)
EVAL = EvalArgs(interval=1000, max_new_tokens=None)


def setup(
    model_name: Optional[Path] = None,
    model_config: Optional[Union[dict[str, Any], Path]] = None,
    initial_checkpoint_dir: Optional[Path] = None,
    tokenizer_dir: Optional[Path] = None,
    out_dir: Path = Path("out/pretrain"),
    data: Optional[DataModule] = None,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EVAL,
    seed: int = 42,
    **kwargs: Any,
) -> None:
    """Train all weights of a model, from random weights or from an existing model (continued pretraining).

    The result, `final/` in the output folder, is a Hugging Face folder.

    Args:
        model_name: Folder with the config.json of the model, whose weights are not used, or the name of one under
            checkpoints/.
        model_config: Fields of a config.json, or a YAML or JSON file with them. They override those of model_name.
        initial_checkpoint_dir: Model to continue training, instead of random weights.
        tokenizer_dir: Folder with the tokenizer; by default that of the model.
        out_dir: Output folder; the result is in final/.
        data: Training data, for example TextFiles with --data.train_data_path FOLDER.
        train: Training options.
        eval: Validation options.
        seed: Seed for initial weights and row order.
    """
    if initial_checkpoint_dir is not None:
        if model_name is not None or model_config is not None or tokenizer_dir is not None:
            raise UserError(
                "--initial_checkpoint_dir already has a model and a tokenizer. Omit --model_name, --model_config, and "
                "--tokenizer_dir."
            )
        base_model = BaseModel.from_folder(initial_checkpoint_dir)
    else:
        folder = tokenizer_dir or model_name
        fields = model_fields(model_name, model_config)
        if folder is None:
            raise UserError("Missing tokenizer. Pass --tokenizer_dir; litgpt tokenizer train creates one.")
        if train.tie_embeddings is not None:
            fields["tie_word_embeddings"] = train.tie_embeddings
        base_model = BaseModel.random(fields, find_folder(folder, weights=False))
    if data is None:
        raise UserError("Missing data. Pass --data, for example --data TextFiles --data.train_data_path FOLDER.")
    next_commands = ('litgpt generate {final} --prompt "..."', "litgpt finetune lora {final} --data ...")
    method = Method("pretrain", train_everything, save, saves_style=False, next_commands=next_commands)
    Run(method, base_model, out_dir, data, train=train, eval=eval, seed=seed, **kwargs)()
