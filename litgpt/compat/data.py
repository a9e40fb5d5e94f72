"""The data sets of `litgpt.data` for Python: `lightning.LightningDataModule`s with LitGPT's arguments and batches."""

from array import array
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split

from litgpt.compat.module import DataModule as DataModule
from litgpt.compat.sft import SFTDataset as SFTDataset
from litgpt.compat.sft import encode
from litgpt.compat.sft import get_sft_collate_fn as get_sft_collate_fn
from litgpt.compat.streams import LitData as LitData
from litgpt.compat.streams import MicroLlama as MicroLlama
from litgpt.compat.streams import OpenWebText as OpenWebText
from litgpt.compat.streams import TinyLlama as TinyLlama
from litgpt.data import documents, json_file, named, pico
from litgpt.data.columns import match
from litgpt.data.forms import rename, to_row
from litgpt.data.sources import RowSource, TextPiece
from litgpt.errors import UserError
from litgpt.text.prompts import PromptStyle

Style = Union[str, PromptStyle]
REQUIRED = Parameter.empty
SHARE = 0.05  # of the rows is held out if a data set says nothing of it


class Instructions(DataModule):
    """Rows with a prompt and an answer, rendered in a named style.

    Attributes:
        train_dataset: The training rows, after `setup`.
        test_dataset: The held-out rows.
    """

    several_turns = False  # whether a conversation makes one row of each prompt and its answer

    def __init__(self, ignore_index: int = -100, num_workers: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.ignore_index, self.num_workers = ignore_index, num_workers
        if isinstance(self.prompt_style, str):
            self.prompt_style = PromptStyle.from_name(self.prompt_style)  # type: ignore[assignment]
        self.train_dataset: Optional[SFTDataset] = None
        self.test_dataset: Optional[SFTDataset] = None

    @property
    def val_dataset(self) -> Optional[SFTDataset]:
        return self.test_dataset

    def prepare_data(self) -> None:
        """Download the files unless they are there."""
        self.sources()

    def setup(self, stage: str = "") -> None:
        train_sources, val_sources = self.sources()
        train: Any = self.rows(train_sources)
        if val_sources is None:
            share = SHARE if self.val_split_fraction is None else self.val_split_fraction
            generator = torch.Generator().manual_seed(self.seed)
            parts = random_split(train, [1 - share, share], generator=generator)
            train, val = ([train[i] for i in part.indices] for part in parts)
        elif self.val_split_fraction:
            raise UserError("Remove val_split_fraction: the data has separate validation rows.")
        else:
            val = self.rows(val_sources)
        self.train_dataset, self.test_dataset = self.dataset(train), self.dataset(val)

    def dataset(self, rows: list[dict[str, Any]]) -> SFTDataset:
        return SFTDataset(
            data=rows,
            tokenizer=self.tokenizer,
            prompt_style=self.prompt_style,
            max_seq_length=self.max_seq_length,
            mask_prompt=bool(self.mask_prompt),
            ignore_index=self.ignore_index,
        )

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.train_dataset, shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.test_dataset)

    def loader(self, dataset: Optional[Dataset], **options: Any) -> DataLoader:
        if dataset is None:
            raise UserError(f"{type(self).__name__}: call connect and setup before the rows are used.")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=self.ignore_index),
            **options,
        )

    def rows(self, sources: list[RowSource]) -> list[dict[str, Any]]:
        """The rows of files with `instruction`, `input`, `output`, and their other columns."""
        found: list[dict[str, Any]] = []
        for source in sources:
            source, rows = source.fitted(source.rows())
            for where, raw in rows:
                try:
                    found += self.instructions(source, where, raw)
                except UserError:
                    if self.on_bad_row == "error":
                        raise
        return found

    def instructions(self, source: RowSource, where: str, raw: Any) -> Iterator[dict[str, Any]]:
        """The rows that a raw row makes: usually one. Raises `UserError` if it cannot be used."""
        fields = self.fields(source, where, raw)
        if fields is None:
            return
        form, columns = match(fields, where, source.form)
        fields = rename(fields, columns, where) if columns else fields
        row = to_row(fields, form, where)
        if row is None:
            return
        system, turns = "", row.messages
        if turns and turns[0]["role"] == "system":
            system, turns = turns[0]["content"], turns[1:]
        plain = [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
        if not turns or not plain or row.tools or (len(turns) > 2 and not self.several_turns):
            raise UserError(
                f"{where}: expected one prompt and one answer. Split the row, or train on whole conversations "
                "and texts with litgpt.finetune.lora.setup(checkpoint_dir, data=...), in a shell litgpt finetune lora."
            )
        own = {k: v for k, v in fields.items() if isinstance(k, str) and k not in ("prompt", "messages")}
        for user, assistant in zip(turns[::2], turns[1::2]):
            made = {"instruction": user["content"], "input": user.get("input") or "", "output": assistant["content"]}
            yield {**(own if len(turns) == 2 else {}), **made, **({"sys_prompt": system} if system else {})}


class JSON(json_file.JSON, Instructions):
    """Rows from a file, or from a folder with train.json and val.json, of any format that `--data` reads.

    Args:
        json_path: The file or folder.
        mask_prompt: Train on answers only.
        val_split_fraction: Fraction of the rows that is held out. Default for a single file: 0.05.
        prompt_style: A style or its name.
        ignore_index: The label of tokens that are not trained on.
        seed: Seed for the split and the order of the rows.
        num_workers: Processes that tokenize rows.
        options: Further options of `--data JSON`, such as `columns`.
    """

    def __init__(
        self,
        json_path: Any,
        mask_prompt: bool = False,
        val_split_fraction: Optional[float] = None,
        prompt_style: Style = "alpaca",
        ignore_index: int = -100,
        seed: int = 42,
        num_workers: int = 4,
        **options: Any,
    ) -> None:
        one = isinstance(json_path, (str, Path)) and not str(json_path).startswith("hf:")
        if one and not Path(json_path).exists() and not any(c in str(json_path) for c in "*?["):
            raise FileNotFoundError(f"json_path {json_path} is neither a file nor a folder.")
        super().__init__(
            json_path,
            mask_prompt=mask_prompt,
            val_split_fraction=val_split_fraction,
            prompt_style=prompt_style,
            ignore_index=ignore_index,
            seed=seed,
            num_workers=num_workers,
            **options,
        )
        if one and Path(json_path).is_file() and val_split_fraction is None and not self.val_path:
            self.val_split_fraction = SHARE
        if one and Path(json_path).is_dir() and val_split_fraction is not None and self.has_no_split():
            raise UserError(f"Remove val_split_fraction: the folder {json_path} must have train.json and val.json.")

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        try:
            return super().sources()
        except UserError as e:
            if all(Path(entry["path"]).is_dir() for entry in self.json_path):
                raise FileNotFoundError(str(e)) from e
            raise

    def has_no_split(self) -> bool:
        """Whether the folder cannot be split, because it has validation rows or no rows."""
        try:
            return self.sources()[1] is not None
        except FileNotFoundError:
            return True


def arguments(**defaults: Any) -> Callable[[type], type]:
    """A class decorator: the arguments of a data set in LitGPT's order, with their defaults. Further options of
    `--data` are keywords."""
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value) for name, value in defaults.items()]
    signature = Signature([*parameters, Parameter("options", Parameter.VAR_KEYWORD)])

    def decorate(cls: type) -> type:
        init = cls.__init__  # type: ignore[misc]

        @wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            init(self, **bound.arguments.pop("options"), **bound.arguments)

        this = Parameter("self", Parameter.POSITIONAL_ONLY)
        __init__.__signature__ = Signature([this, *signature.parameters.values()])  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[misc]
        return cls

    return decorate


LOADING = {"ignore_index": -100, "seed": 42, "num_workers": 4}


def common(share: Optional[float], style: str = "alpaca") -> dict[str, Any]:
    """The arguments that all data sets have. Those with validation rows of their own have no share to hold out."""
    split = {} if share is None else {"val_split_fraction": share}
    return {"mask_prompt": False, **split, "prompt_style": style, **LOADING}


def only_file(data_set: type) -> dict[str, Any]:
    name, url = next(iter(data_set.train.items()))  # type: ignore[attr-defined]
    return {"file_url": url, "file_name": name}


@arguments(**common(0.03865), download_dir=Path("data/alpaca"), **only_file(named.Alpaca))
class Alpaca(named.Alpaca, Instructions):
    """Alpaca: 52,000 instructions with answers by text-davinci-003, cleaned."""

    def __init__(self, file_url: str, file_name: str, **options: Any) -> None:
        super().__init__(**options)
        self.train = {file_name: file_url}


@arguments(
    **common(0.03847),
    download_dir=Path("data/alpacagpt4"),
    **only_file(named.AlpacaGPT4) | {"file_name": "alpacagpt4_data_cleaned_archive.json"},
)
class AlpacaGPT4(named.AlpacaGPT4, Instructions):
    """Alpaca's 52,000 instructions with answers by GPT-4."""

    def __init__(self, file_url: str, file_name: str, **options: Any) -> None:
        super().__init__(**options)
        self.train = {file_name: file_url}


@arguments(
    **common(0.05),
    download_dir=Path("data/alpaca2k"),
    file_url=None,
    file_name=None,
    repo_id="mhenrichsen/alpaca_2k_test",
)
class Alpaca2k(named.Alpaca2k, Instructions):
    """2,000 rows of Alpaca. `file_url` and `file_name` have no effect, as in LitGPT."""

    def __init__(self, repo_id: str, file_url: Any, file_name: Any, **options: Any) -> None:
        super().__init__(**options)
        self.train = {"alpaca2k": f"hf:{repo_id}"}


@arguments(**common(0.1), download_dir=Path("data/dolly"))
class Dolly(named.Dolly, Instructions):
    """Dolly: 15,000 instructions and answers, written by employees of Databricks."""


@arguments(**common(None, "longform"), download_dir=Path("data/longform"))
class LongForm(named.LongForm, Instructions):
    """LongForm: human-written texts with generated instructions."""


@arguments(**common(None, "flan"), download_dir=Path("data/flan"), url=None, subsets=None)
class FLAN(named.FLAN, Instructions):
    """FLAN: many language tasks, written as instructions. `url` is another server for its files."""

    def __init__(self, url: Optional[str], **options: Any) -> None:
        super().__init__(**options)
        if url is not None:
            self.train, self.val = (
                {name: f"{url}/{split}/{name}" for name in files}
                for split, files in (("train", self.train), ("test", self.val))
            )


@arguments(
    **common(None),
    include_multiturn_conversations=False,
    download_dir=Path("data/deita"),
    repo_id="HuggingFaceH4/deita-10k-v0-sft",
)
class Deita(named.Deita, Instructions):
    """Deita: 10,000 conversations, selected for complexity and quality. Each prompt with its answer is a row."""

    several_turns = True

    def __init__(self, repo_id: str, **options: Any) -> None:
        super().__init__(**options)
        self.train, self.val = ({split: f"hf:{repo_id}:{split}"} for split in ("train_sft", "test_sft"))


@arguments(**common(0.1), include_multiturn_conversations=False, repo_id="GAIR/lima", access_token=None)
class LIMA(named.LIMA, Instructions):
    """LIMA: 1,030 curated conversations. Each prompt with its answer is a row."""

    several_turns = True

    def __init__(self, repo_id: str, **options: Any) -> None:
        super().__init__(**options)
        self.train = {"train.jsonl": f"hub:{repo_id}/train.jsonl"}


class PicoPairs(pico.PicoPairs, Instructions):
    """Pairs for the built-in model; the chosen answers."""

    def __init__(self, prompt_style: Style = "alpaca", **options: Any) -> None:
        super().__init__(prompt_style=prompt_style, **options)


class PicoSums(pico.PicoSums, Instructions):
    """Sums for the built-in model."""

    def __init__(self, prompt_style: Style = "alpaca", **options: Any) -> None:
        super().__init__(prompt_style=prompt_style, **options)


class Texts(DataModule):
    """Texts for pretraining: blocks of `max_seq_length` + 1 tokens, shape (B, `max_seq_length` + 1). The texts lie end
    to end, each after BOS; the last tokens that do not fill a block are left out."""

    def __init__(self, num_workers: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.num_workers = num_workers
        self.blocks: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Download the files unless they are there."""
        self.sources()

    def setup(self, stage: str = "") -> None:
        train, val = self.sources()
        if val is None:
            val = train[:1] if len(train) > 1 else None
            train = train[1:] if val else train
        blocks = self.tokens(train)
        if val is None:
            held = max(1, round(SHARE * len(blocks))) if len(blocks) > 1 else 0
            self.blocks = {"train": blocks[held:], "val": blocks[:held]}
        else:
            self.blocks = {"train": blocks, "val": self.tokens(val)}

    def tokens(self, sources: list[RowSource]) -> Tensor:
        """The blocks of files, shape (number of blocks, `max_seq_length` + 1), int64."""
        if self.max_seq_length < 1:
            raise UserError(f"{type(self).__name__}: pass max_seq_length to connect.")
        ids = array("i")
        for source in sources:
            for where, raw in source.rows():
                fields = self.fields(source, where, raw)
                text = fields["text"] if fields else ""
                first = not isinstance(text, TextPiece) or text.first
                text = text.text if isinstance(text, TextPiece) else str(text).strip()
                ids.extend(encode(self.tokenizer, text, bos=first, eos=False).tolist())
        size = self.max_seq_length + 1
        if len(ids) < size:
            raise UserError(f"{type(self).__name__}: the texts have {len(ids)} tokens; a block has {size}.")
        return torch.tensor(ids[: len(ids) // size * size], dtype=torch.int64).view(-1, size)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def loader(self, part: str, **options: Any) -> DataLoader:
        if not self.blocks:
            self.setup()
        blocks: Any = self.blocks[part]
        return DataLoader(blocks, batch_size=self.batch_size, num_workers=self.num_workers, drop_last=True, **options)


@arguments(train_data_path=REQUIRED, val_data_path=None, seed=42, num_workers=4)
class TextFiles(documents.TextFiles, Texts):
    """Text files. Without `val_data_path`, the first file is for validation."""


@arguments(data_path=Path("data/tinystories"), seed=42, num_workers=8)
class TinyStories(named.TinyStories, Texts):
    """TinyStories: stories in the vocabulary of small children. The first file is for validation."""

    def __init__(self, data_path: Path, **options: Any) -> None:
        super().__init__(download_dir=data_path, **options)


class PicoText(pico.PicoText, Texts):
    """Stories for the built-in model."""
