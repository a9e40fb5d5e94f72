"""`litgpt pretrain`"""

from pathlib import Path
from typing import Any, Optional, Union

from litgpt.checkpoint.find import find_folder, local_folder
from litgpt.data.data_module import DataModule
from litgpt.errors import UserError
from litgpt.families import read_config
from litgpt.finetune.full import finish, save, train_everything
from litgpt.model.config import Config, differences, known_models, known_repositories
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.base_model import BaseModel, model_fields
from litgpt.train.method import USE_COMMANDS, Method
from litgpt.train.result import TrainingResult
from litgpt.train.run import Run

TRAIN = TrainArgs(global_batch_size=512, micro_batch_size=4, epochs=1, max_norm=1.0, min_lr=4e-5)
EVAL = EvalArgs(max_new_tokens=None)
WARMUP_STEPS = 2000  # at most, if --train.lr_warmup_steps is auto


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
) -> Optional[TrainingResult]:
    """Train all weights of a model, from random weights or from an existing model (continued pretraining).

    The result, `final/` in the output folder, is a Hugging Face folder.

    Args:
        model_name: Folder with the config.json of the model, whose weights are not used, or the name of one under
            checkpoints/. With initial_checkpoint_dir, it must describe the same model. `list` shows the known models.
        model_config: Fields of a config.json, or a YAML or JSON file with them. They override those of model_name.
        initial_checkpoint_dir: Model to continue training, instead of random weights.
        tokenizer_dir: Folder with the tokenizer; by default that of the model. With initial_checkpoint_dir, it must be
            the same tokenizer.
        out_dir: Output folder; the result is in final/.
        data: Training data: files, a folder, hf:ORG/NAME, or the name of a data set.
        train: Training options.
        eval: Validation options.
        seed: Seed for initial weights and row order.
    """
    if str(model_name) == "list" and local_folder(Path("list")) is None:
        print("\n".join(sorted(known_models(), key=str.lower)))
        return None
    if data is None and (model_name or model_config or initial_checkpoint_dir):  # before anything is downloaded
        raise UserError("Missing data. Pass --data, for example --data TextFiles --data.train_data_path FOLDER.")
    if initial_checkpoint_dir is not None:
        base_model = BaseModel.from_folder(initial_checkpoint_dir, planned=kwargs.get("dry_run", False)).merged()
        check_same_model(base_model, model_name, model_config)
        check_same_tokenizer(base_model, tokenizer_dir)
    else:
        folder = tokenizer_dir or model_name
        fields = model_fields(model_name, model_config)
        if folder is None:
            raise UserError("Missing tokenizer. Pass --tokenizer_dir; litgpt tokenizer train creates one.")
        if train.tie_embeddings is not None:
            fields["tie_word_embeddings"] = train.tie_embeddings
        base_model = BaseModel.random(fields, find_folder(folder, weights=False))
    assert data is not None
    next_commands = (*USE_COMMANDS, "litgpt finetune lora {folder} --data my.jsonl  # your rows")
    method = Method(
        name="pretrain",
        apply=train_everything,
        save=save,
        finish=finish,
        saves_style=False,
        next_commands=next_commands,
        warmup_steps=WARMUP_STEPS,
    )
    return Run(method, base_model, out_dir, data, train=train, eval=eval, seed=seed, **kwargs)()


def check_same_model(base_model: BaseModel, name: Optional[Path], config: Any) -> None:
    """Raise `UserError` unless a name or fields, if given, describe the model that training continues from. Its number
    of embeddings may differ, which LitGPT pads."""
    if name is None and config is None:
        return
    known = known_models().get(str(name)) or known_repositories().get(str(name))
    if config is None and known is not None and local_folder(Path(str(name))) is None:
        described = Config(**known)
    elif config is None and is_same_folder(Path(str(name)), base_model):
        return
    else:
        described = read_config({"vocab_size": base_model.config.padded_vocab_size, **model_fields(name, config)})
    if other := [field for field in differences(base_model.config, described) if field != "padded_vocab_size"]:
        option = "--model_config" if name is None else f"--model_name {name}"
        raise UserError(
            f"{option} is not the model in --initial_checkpoint_dir {base_model.name}: they differ in "
            f"{', '.join(other)}. Omit {option.partition(' ')[0]}."
        )


def check_same_tokenizer(base_model: BaseModel, folder: Optional[Path]) -> None:
    """Raise `UserError` unless a tokenizer, if given, is that of the model that training continues from."""
    if folder is None or is_same_folder(folder, base_model):
        return
    if not base_model.tokenizer().is_like(Tokenizer(find_folder(folder, weights=False))):
        raise UserError(
            f"--tokenizer_dir {folder} is not the tokenizer of --initial_checkpoint_dir {base_model.name}. Omit it."
        )


def is_same_folder(name: Path, base_model: BaseModel) -> bool:
    return find_folder(name, weights=False).samefile(base_model.tokenizer_folder)
