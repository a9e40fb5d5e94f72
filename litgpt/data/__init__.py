"""Data sets and files: rows, then token ids, then batches without padding."""

from litgpt.data.base import DataModule
from litgpt.data.json_file import JSON

__all__ = ["JSON", "DataModule"]
