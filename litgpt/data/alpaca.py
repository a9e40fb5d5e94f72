"""Alpaca."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import fetch
from litgpt.errors import remark

URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"


class Alpaca(DataModule):
    """Alpaca: 52,000 instructions with answers of text-davinci-003, cleaned.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts.
        val_split_fraction: The share of the rows that is held back for validation, at least 0 and below 1.
        prompt_style: The name of a style; chat for the checkpoint's chat template; auto for that or, without
            one, alpaca.
        download_dir: Where the file is kept.
    """

    def __init__(
        self,
        mask_prompt: bool = False,
        val_split_fraction: float = 0.03865,
        prompt_style: str = "alpaca",
        download_dir: Path = Path("data/alpaca"),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            mask_prompt=mask_prompt, val_split_fraction=val_split_fraction, prompt_style=prompt_style, **kwargs
        )
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        return [RowSource(fetch(URL, self.download_dir / "alpaca_data_cleaned_archive.json"))], None


def or_alpaca(data: Optional[DataModule]) -> DataModule:
    """The data set that was named, or LitGPT's default, which is said."""
    if data is not None:
        return data
    remark("no --data: LitGPT's default is taken, Alpaca's 52,000 rows. Yours: --data JSON --data.json_path FILE")
    return Alpaca()
