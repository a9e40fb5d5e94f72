"""Alpaca with answers of GPT-4."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import fetch

URL = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"


class AlpacaGPT4(DataModule):
    """Alpaca's 52,000 instructions with answers of GPT-4.

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
        val_split_fraction: float = 0.03847,
        prompt_style: str = "alpaca",
        download_dir: Path = Path("data/alpacagpt4"),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            mask_prompt=mask_prompt, val_split_fraction=val_split_fraction, prompt_style=prompt_style, **kwargs
        )
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        return [RowSource(fetch(URL, self.download_dir / "alpaca_gpt4_data.json"))], None
