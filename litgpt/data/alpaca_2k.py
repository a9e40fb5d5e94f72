"""Alpaca, 2,000 rows of it."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import placed

HUB = "hf:mhenrichsen/alpaca_2k_test"


class Alpaca2k(DataModule):
    """2,000 rows of Alpaca, the data set of most recipes.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts.
        val_split_fraction: The share of the rows that is held back for validation, at least 0 and below 1.
        prompt_style: The name of a style; chat for the checkpoint's chat template; auto for that or, without
            one, alpaca.
        download_dir: May have alpaca2k.parquet (or .json, .jsonl); otherwise the Hugging Face hub is asked.
    """

    def __init__(
        self,
        mask_prompt: bool = False,
        val_split_fraction: float = 0.05,
        prompt_style: str = "alpaca",
        download_dir: Path = Path("data/alpaca2k"),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            mask_prompt=mask_prompt, val_split_fraction=val_split_fraction, prompt_style=prompt_style, **kwargs
        )
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        return [RowSource(placed(self.download_dir, "alpaca2k") or HUB)], None
