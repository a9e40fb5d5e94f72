"""`litgpt pretrain`"""

from pathlib import Path
from typing import Any, Optional, Union

from litgpt.checkpoint.find import find_folder
from litgpt.data import DataModule
from litgpt.errors import UserError
from litgpt.finetune.full import save, train_everything
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.base_model import BaseModel, model_fields
from litgpt.train.method import Method
from litgpt.train.run import run

TRAIN = TrainArgs(
    save_interval=1000,
    global_batch_size=512,
    micro_batch_size=4,
    lr_warmup_steps=2000,
    epochs=1,
    max_norm=1.0,
    min_lr=4e-5,
)
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
    """Train all weights of a model, from a random start or from an existing model (continued pretraining).

    The result, `final/` in the output folder, is a Hugging Face folder.

    Args:
        model_name: A folder whose config.json says what the model is (its weights are not read), or the name of one
            under checkpoints/.
        model_config: Fields of a config.json, or a YAML or JSON file with them; they win over those of model_name.
        initial_checkpoint_dir: The model to continue with, instead of a random start.
        tokenizer_dir: The folder with the tokenizer; by default that of the model.
        out_dir: Where everything is written; final/ in it is the result.
        data: The texts, for example TextFiles with --data.train_data_path FOLDER.
        train: How long, how much at a time, and how fast to learn. One epoch by default.
        eval: When and how the model is judged.
        seed: For the weights that are drawn, and the order of the rows.
    """
    if initial_checkpoint_dir is not None:
        if model_name is not None or model_config is not None or tokenizer_dir is not None:
            raise UserError(
                "--initial_checkpoint_dir brings its own model and tokenizer: leave the other options away."
            )
        start = BaseModel.from_folder(initial_checkpoint_dir)
    else:
        folder = tokenizer_dir or model_name
        fields = model_fields(model_name, model_config)
        if folder is None:
            raise UserError("Which tokenizer? Give --tokenizer_dir (litgpt tokenizer train makes one).")
        if train.tie_embeddings is not None:
            fields["tie_word_embeddings"] = train.tie_embeddings
        start = BaseModel.random(fields, find_folder(folder, weights=False))
    if data is None:
        raise UserError("No data: name it with --data, for example --data TextFiles --data.train_data_path FOLDER.")
    next_commands = ('litgpt generate {final} --prompt "..."', "litgpt finetune lora {final} --data ...")
    method = Method("pretrain", train_everything, save, saves_style=False, next_commands=next_commands)
    run(method, start, out_dir, data, train=train, eval=eval, seed=seed, **kwargs)
