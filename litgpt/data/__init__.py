"""Data sets and files: from rows to token ids to batches without padding."""

from litgpt.data.base import DataModule as DataModule
from litgpt.data.json_file import JSON
from litgpt.data.named import FLAN, LIMA, Alpaca, Alpaca2k, AlpacaGPT4, Deita, Dolly, LongForm, TinyStories
from litgpt.data.pico import PicoSums, PicoText
from litgpt.data.text_files import TextFiles

__all__ = [
    "FLAN",
    "JSON",
    "LIMA",
    "Alpaca",
    "Alpaca2k",
    "AlpacaGPT4",
    "Deita",
    "Dolly",
    "LongForm",
    "PicoSums",
    "PicoText",
    "TextFiles",
    "TinyStories",
]
