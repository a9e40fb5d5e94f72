"""TinyStories."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import fetch, hub_url, unpack
from litgpt.errors import UserError

NAME = "TinyStories_all_data"


class TinyStories(DataModule):
    """TinyStories: plain text for pretraining, stories that GPT-3.5 and GPT-4 told in the words of small children.

    Args:
        download_dir: Where the archive is kept and unpacked, several gigabytes. The first of its files is for
            validation.
    """

    packed = True

    def __init__(self, download_dir: Path = Path("data/tinystories"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        folder = self.download_dir / NAME
        if not folder.is_dir():
            archive = self.download_dir / f"{NAME}.tar.gz"
            unpack(fetch(hub_url("roneneldan/TinyStories", archive.name), archive), folder)
        files = sorted(folder.glob("data*.json"))
        if len(files) < 2:
            raise UserError(f"{folder} has {len(files)} files data*.json; at least two are needed. Remove the folder.")
        val, *train = [RowSource(file, columns={"text": "story"}, form="text") for file in files]
        return train, [val]
