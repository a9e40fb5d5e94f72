"""Data sets of LitGPT that are read from the optimized files of the package `litdata`."""

from pathlib import Path
from typing import Any, Optional, Union

import torch

from litgpt.compat.module import DataModule
from litgpt.compat.sft import encode
from litgpt.errors import UserError, install_command

SHARES = {"slimpajama": 0.693584, "starcoder": 0.306416}  # of TinyLlama's training tokens


def litdata() -> Any:
    """The package, or a `UserError` that says how to install it."""
    try:
        import litdata.streaming
    except ImportError as e:
        raise UserError(
            f"This data set needs the package litdata. In the clone of litgpt, run: {install_command('litdata')}. For "
            "your own texts, use TextFiles, which does not need it."
        ) from e
    return litdata


class Streams(DataModule):
    """Blocks of `max_seq_length` + 1 tokens from files that `litdata.optimize` wrote.

    Args:
        data_path: The folder of the files, or an address that litdata reads.
        seed: Seed for the order of the blocks.
        num_workers: Processes that read.
    """

    def __init__(self, data_path: Union[str, Path] = Path("data"), seed: int = 42, num_workers: int = 8) -> None:
        super().__init__(seed=seed)
        self.data_path, self.num_workers = data_path, num_workers
        litdata()

    @property
    def seq_length(self) -> int:
        """Tokens of a block: one more than the model reads, for the targets."""
        return self.max_seq_length + 1

    def connect(
        self, tokenizer: Optional[Any] = None, batch_size: int = 1, max_seq_length: Optional[int] = 2048
    ) -> None:
        super().connect(tokenizer, batch_size, 2048 if max_seq_length is None else max_seq_length)

    def place(self, *parts: str) -> str:
        return "/".join([str(self.data_path).rstrip("/"), *parts])

    def blocks(self, folder: str, shuffle: bool) -> Any:
        loader = litdata().streaming.TokensLoader(block_size=self.seq_length)
        options = {"shuffle": shuffle, "drop_last": True, "seed": self.seed}
        return litdata().StreamingDataset(input_dir=folder, item_loader=loader, **options)

    def loader(self, dataset: Any) -> Any:
        return litdata().StreamingDataLoader(
            dataset, batch_size=self.batch_size, pin_memory=True, num_workers=self.num_workers, drop_last=True
        )

    def check_folders(self, folders: list[str]) -> None:
        for folder in folders:
            if "://" not in folder and not Path(folder).is_dir():
                raise FileNotFoundError(f"{folder} does not exist. Write its files with litdata.optimize.")


class LitData(Streams):
    """Your own optimized files.

    Args:
        data_path: The folder of the files.
        split_names: The folders of the training and the validation blocks below it; None to use data_path for both.
        seed: Seed for the order of the blocks.
        num_workers: Processes that read.
    """

    def __init__(
        self,
        data_path: Union[str, Path] = Path("data"),
        split_names: Optional[tuple[str, str]] = None,
        seed: int = 42,
        num_workers: int = 8,
    ) -> None:
        if split_names is not None and len(split_names) != 2:
            raise UserError(f"split_names {split_names}: expected the folders of training and validation.")
        super().__init__(data_path, seed, num_workers)
        self.split_names = split_names

    def train_dataloader(self) -> Any:
        return self.loader(self.blocks(self.place(*(self.split_names or [])[:1]), shuffle=True))

    def val_dataloader(self) -> Any:
        return self.loader(self.blocks(self.place(*(self.split_names or [])[1:]), shuffle=False))


class OpenWebText(Streams):
    """OpenWebText: web pages that were linked on Reddit. `prepare_data` downloads and tokenizes them.

    Args:
        data_path: The folder of the files, with train/ and val/.
        val_split_fraction: Fraction of the pages that is held out.
        seed: Seed for the split and the order of the blocks.
        num_workers: Processes that read.
    """

    def __init__(
        self,
        data_path: Union[str, Path] = Path("data/openwebtext"),
        val_split_fraction: float = 0.0005,
        seed: int = 42,
        num_workers: int = 8,
    ) -> None:
        super().__init__(data_path, seed, num_workers)
        self.val_split_fraction = val_split_fraction

    def prepare_data(self) -> None:
        folders = {"train": self.place("train"), "val": self.place("val")}
        if "://" in str(self.data_path) or all(Path(folder).is_dir() for folder in folders.values()):
            return
        try:
            from datasets import load_dataset
        except ImportError as e:
            raise UserError(
                f"OpenWebText needs the package datasets. In the clone of litgpt, run: {install_command('data')}"
            ) from e
        pages = load_dataset("Skylion007/openwebtext", split="train", trust_remote_code=True)
        split = pages.train_test_split(test_size=self.val_split_fraction, seed=self.seed, shuffle=True)
        for part, folder in folders.items():
            rows = split["train" if part == "train" else "test"]
            litdata().optimize(
                fn=PageTokens(rows, self.tokenizer),
                inputs=list(range(len(rows))),
                output_dir=folder,
                num_workers=self.num_workers,
                chunk_bytes="200MB",
                item_loader=litdata().streaming.TokensLoader(),
            )

    def train_dataloader(self) -> Any:
        return self.loader(self.blocks(self.place("train"), shuffle=True))

    def val_dataloader(self) -> Any:
        return self.loader(self.blocks(self.place("val"), shuffle=False))


class PageTokens:
    """The tokens of a page by its number, for processes that litdata starts."""

    def __init__(self, rows: Any, tokenizer: Any) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    def __call__(self, index: int) -> Any:
        yield encode(self.tokenizer, self.rows[index]["text"], eos=True).to(torch.int32)


class TinyLlama(Streams):
    """TinyLlama's data: SlimPajama and, in the share of the paper, StarCoder, tokenized and optimized beforehand.

    Args:
        data_path: The folder with slimpajama/train, slimpajama/val, and starcoder.
        seed: Seed for the order of the blocks.
        num_workers: Processes that read.
        use_starcoder: Whether to train on StarCoder, too.
    """

    def __init__(
        self,
        data_path: Union[str, Path] = Path("data"),
        seed: int = 42,
        num_workers: int = 8,
        use_starcoder: bool = True,
    ) -> None:
        super().__init__(data_path, seed, num_workers)
        self.use_starcoder = use_starcoder

    def folders(self) -> dict[str, str]:
        """The folders of the training blocks, by the name of their source."""
        code = {"starcoder": self.place("starcoder")} if self.use_starcoder else {}
        return {"slimpajama": self.place("slimpajama", "train"), **code}

    def prepare_data(self) -> None:
        self.check_folders([*self.folders().values(), self.place("slimpajama", "val")])

    def train_dataloader(self) -> Any:
        sets = {name: self.blocks(folder, shuffle=True) for name, folder in self.folders().items()}
        if len(sets) == 1:
            return self.loader(sets["slimpajama"])
        shares = [SHARES[name] for name in sets]
        mixed = litdata().CombinedStreamingDataset(
            datasets=list(sets.values()), seed=self.seed, weights=shares, iterate_over_all=False
        )
        return self.loader(mixed)

    def val_dataloader(self) -> Any:
        return self.loader(self.blocks(self.place("slimpajama", "val"), shuffle=True))


class MicroLlama(TinyLlama):
    """MicroLlama's data: SlimPajama alone.

    Args:
        data_path: The folder with slimpajama/train and slimpajama/val.
        seed: Seed for the order of the blocks.
        num_workers: Processes that read.
    """

    def __init__(self, data_path: Union[str, Path] = Path("data"), seed: int = 42, num_workers: int = 8) -> None:
        super().__init__(data_path, seed, num_workers, use_starcoder=False)
