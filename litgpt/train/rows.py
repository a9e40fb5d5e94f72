"""The rows of a run: loaded, checked, and packed."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

from filelock import FileLock

from litgpt.data.cache import cache_folder
from litgpt.data.check import check_ids, data_problems
from litgpt.data.data_module import DataModule, TokenizedDataset
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.text.prompts import STYLE_FILE, load_style
from litgpt.train.args import TrainArgs
from litgpt.train.base_model import BaseModel
from litgpt.train.devices.launch import started_by

if TYPE_CHECKING:
    from litgpt.train.run import Run


def uses_packs(train: TrainArgs, data: DataModule) -> bool:
    return data.packed if train.pack is None else train.pack


def row_limit(train: TrainArgs, config: Config, data: DataModule) -> int:
    """The maximum length of a row, or of a pack, in tokens. Raises `UserError` if that exceeds the context length."""
    limit = train.max_seq_length
    if limit is not None and limit > config.block_size:
        field = "n_positions" if config.learned_positions else "max_position_embeddings"
        raise UserError(
            f"--train.max_seq_length {limit} is longer than the context of the model ({field} {config.block_size}). "
            f"Set it to at most {config.block_size}, or omit it."
        )
    return limit or (min(config.block_size, 2048) if uses_packs(train, data) else config.block_size)


def load_dataset(run: "Run") -> TokenizedDataset:
    """The tokenized rows. Raises `UserError` if they cannot be trained on."""
    config, base_model, evaluate = run.base_model.config, run.base_model, run.eval
    # processes of one launcher take turns: the first one tokenizes, the others find the tokens in the cache
    turn = FileLock(cache_folder() / ".turn") if started_by() else nullcontext()
    with turn, run.screen.counting("rows tokenized") as show_count:
        dataset = run.source.load(run.tokenizer, base_model.style_folder, run.row_limit, show_count, config.block_size)
    check_dataset(dataset, config)
    row = evaluate.evaluate_example
    if isinstance(row, int) and row >= len(dataset.val):
        raise UserError(f"--eval.evaluate_example {row} is out of range: there are {len(dataset.val)} validation rows.")
    if evaluate.early_stopping_patience is not None and not len(dataset.val):
        raise UserError("--eval.early_stopping_patience needs validation rows, and there are none.")
    return dataset


def check_dataset(dataset: TokenizedDataset, config: Config) -> None:
    """Raise `UserError` if the rows have tokens that the model lacks, or problems that would make a run useless."""
    check_ids(dataset, config.padded_vocab_size)
    if problems := data_problems(dataset):
        raise UserError(" ".join(problems) + " For details, run litgpt data check with the same options.")


def changed_style(dataset: TokenizedDataset, base_model: BaseModel) -> list[str]:
    """A note if the base model was trained with another prompt style."""
    if dataset.plain_text or not (base_model.style_folder / STYLE_FILE).is_file():
        return []
    before = load_style(base_model.style_folder)
    if before == dataset.style:
        return []
    return [f"The base model was trained with the prompt style {before.name}; these rows use {dataset.style.name}."]
