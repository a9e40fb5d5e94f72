"""LongForm."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import fetch

URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"
NAMES = {"input": "instruction"}


class LongForm(DataModule):
    """LongForm: texts of people with instructions made to fit them; its validation rows are its own.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts.
        prompt_style: The name of a style; chat for the checkpoint's chat template; auto for that or, without
            one, alpaca.
        download_dir: Where the files are kept.
    """

    def __init__(
        self,
        mask_prompt: bool = False,
        prompt_style: str = "longform",
        download_dir: Path = Path("data/longform"),
        **kwargs: Any,
    ) -> None:
        super().__init__(mask_prompt=mask_prompt, prompt_style=prompt_style, **kwargs)
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        train, val = (fetch(f"{URL}/{name}", self.download_dir / name) for name in ("train.json", "val.json"))
        return [RowSource(train)], [RowSource(val)]

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        return {NAMES.get(name, name): value for name, value in fields.items()}
