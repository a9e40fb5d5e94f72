"""The base of the data sets for Python."""

from typing import Any, Optional

from lightning import LightningDataModule

from litgpt.data import data_module
from litgpt.data.sources import RowSource
from litgpt.errors import UserError


class DataModule(LightningDataModule, data_module.DataModule):
    """A data set for your own loop or `lightning.Trainer`. `connect` comes first, then `prepare_data` and `setup`.

    Attributes:
        tokenizer: The tokenizer that `connect` sets.
        batch_size: Rows in a batch.
        max_seq_length: Maximum length of a row in tokens; -1 for no limit.
    """

    tokenizer: Any = None
    batch_size: int = 1
    max_seq_length: int = -1

    def __init__(self, **options: Any) -> None:
        LightningDataModule.__init__(self)
        data_module.DataModule.__init__(self, **options)

    def connect(
        self, tokenizer: Optional[Any] = None, batch_size: int = 1, max_seq_length: Optional[int] = None
    ) -> None:
        """Set what the rows are tokenized with. Call this before `setup`."""
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length

    def setup(self, stage: str = "") -> None:
        """Read the rows."""

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        raise UserError(
            f"{type(self).__name__} does not implement sources, so only your own loop or lightning.Trainer can use it."
        )
