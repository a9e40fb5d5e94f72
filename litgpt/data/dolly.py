"""Dolly."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import fetch, hub_url

FILE = "databricks-dolly-15k.jsonl"
NAMES = {"context": "input", "response": "output"}


class Dolly(DataModule):
    """Dolly: 15,000 instructions and answers that employees of Databricks wrote.

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
        val_split_fraction: float = 0.1,
        prompt_style: str = "alpaca",
        download_dir: Path = Path("data/dolly"),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            mask_prompt=mask_prompt, val_split_fraction=val_split_fraction, prompt_style=prompt_style, **kwargs
        )
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        return [RowSource(fetch(hub_url("databricks/databricks-dolly-15k", FILE), self.download_dir / FILE))], None

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        return {NAMES.get(name, name): value for name, value in fields.items()}
