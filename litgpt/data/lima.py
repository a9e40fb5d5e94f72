"""LIMA."""

import os
from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import fetch, hub_url

REPOSITORY = "GAIR/lima"
FILE = "train.jsonl"
HINT = (
    f"The data set is gated: accept its terms at https://huggingface.co/datasets/{REPOSITORY}, "
    "then set HF_TOKEN or --data.access_token."
)


class LIMA(DataModule):
    """LIMA: 1,030 chosen conversations. The data set is gated: accept its terms on the Hugging Face hub first.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts.
        val_split_fraction: The share of the rows that is held back for validation, at least 0 and below 1.
        prompt_style: The name of a style; chat for the checkpoint's chat template; auto for that or, without
            one, chatml.
        include_multiturn_conversations: Whether conversations are whole; otherwise each is cut to its first prompt
            and answer. Needs a prompt style for several turns, such as chat.
        access_token: A token of the Hugging Face hub; by default what the environment variable HF_TOKEN holds.
        download_dir: Where the file is kept.
    """

    def __init__(
        self,
        mask_prompt: bool = False,
        val_split_fraction: float = 0.1,
        prompt_style: str = "alpaca",
        include_multiturn_conversations: bool = False,
        access_token: Optional[str] = None,
        download_dir: Path = Path("data/lima"),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            mask_prompt=mask_prompt, val_split_fraction=val_split_fraction, prompt_style=prompt_style, **kwargs
        )
        self.include_multiturn_conversations = include_multiturn_conversations
        self.access_token = access_token
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        token = self.access_token or os.environ.get("HF_TOKEN")
        return [RowSource(fetch(hub_url(REPOSITORY, FILE), self.download_dir / FILE, token, HINT))], None

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        texts = fields.get("conversations")
        if not isinstance(texts, list):
            return fields  # refused where forms are recognised
        if not self.include_multiturn_conversations:
            texts = texts[:2]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return {"messages": messages} if len(messages) > 1 else None
