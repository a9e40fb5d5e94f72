"""Deita."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import placed

HUB = "hf:HuggingFaceH4/deita-10k-v0-sft"
SPLITS = ("train_sft", "test_sft")


class Deita(DataModule):
    """Deita: 10,000 conversations, chosen for being complex and good; its validation rows are its own.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts.
        prompt_style: The name of a style; chat for the checkpoint's chat template; auto for that or, without
            one, chatml.
        include_multiturn_conversations: Whether conversations are whole; otherwise each is cut to its first prompt
            and answer. Needs a prompt style for several turns, such as chat.
        download_dir: May have train_sft.parquet and test_sft.parquet (or .json, .jsonl); otherwise the Hugging Face
            hub is asked.
    """

    def __init__(
        self,
        mask_prompt: bool = False,
        prompt_style: str = "alpaca",
        include_multiturn_conversations: bool = False,
        download_dir: Path = Path("data/deita"),
        **kwargs: Any,
    ) -> None:
        super().__init__(mask_prompt=mask_prompt, prompt_style=prompt_style, **kwargs)
        self.include_multiturn_conversations = include_multiturn_conversations
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        train, val = ([RowSource(placed(self.download_dir, split) or f"{HUB}:{split}")] for split in SPLITS)
        return train, val

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        messages = fields.get("messages")
        if not isinstance(messages, list):
            return fields  # refused where forms are recognised
        if not self.include_multiturn_conversations:
            has_system = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
            messages = messages[: 2 + has_system]
        return {"messages": messages}
