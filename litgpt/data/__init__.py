"""Data sets and files: rows, then token ids, then batches without padding."""

from litgpt.data.alpaca import Alpaca
from litgpt.data.alpaca_2k import Alpaca2k
from litgpt.data.alpaca_gpt4 import AlpacaGPT4
from litgpt.data.base import DataModule as DataModule
from litgpt.data.deita import Deita
from litgpt.data.dolly import Dolly
from litgpt.data.flan import FLAN
from litgpt.data.json_file import JSON
from litgpt.data.lima import LIMA
from litgpt.data.longform import LongForm
from litgpt.data.pico import PicoSums, PicoText
from litgpt.data.text_files import TextFiles
from litgpt.data.tinystories import TinyStories

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
