"""A folder as a model that answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.errors import UserError
from litgpt.generate.reference_outputs import stored_dtypes
from litgpt.generate.sequentially import DeviceCount, spread, usable_devices
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizeName
from litgpt.model import GPT
from litgpt.model.blocks import check_compiler, compile_blocks
from litgpt.model.devices import DTYPES, Accelerator, PrecisionName, default_precision, pick_device, share_threads
from litgpt.model.linear import prepack
from litgpt.text.prompts import PromptStyle
from litgpt.text.tokenizer import Tokenizer


@dataclass
class InferenceModel:
    """A model with its tokenizer and its prompt style, from a model folder or an adapter folder."""

    source: ModelSource
    model: GPT
    tokenizer: Tokenizer
    style: PromptStyle

    @classmethod
    def open(
        cls,
        path: Path,
        base: Optional[Path] = None,
        precision: Optional[PrecisionName] = None,
        quantize: Optional[QuantizeName] = None,
        accelerator: Accelerator = "auto",
        devices: DeviceCount = 1,
    ) -> "InferenceModel":
        """Load a folder, or the model of that name.

        Args:
            base: Base model of the adapter, instead of the recorded one.
            precision: By default as `natural_precision`.
            devices: How many to spread the layers over. With several, the weights pass through the memory of the CPU.

        Raises:
            UserError: the folder cannot be used, or there are not as many devices, or quantized layers for several.
        """
        chosen = usable_devices(accelerator, devices)
        if len(chosen) > 1 and quantize is not None:
            raise UserError(f"--quantize {quantize} needs one device. It does not work with --devices {len(chosen)}.")
        source = ModelSource.open(path, base)
        tokenizer, style = source.tokenizer(), source.style()
        dtype = DTYPES[precision or natural_precision(source, chosen[0])]
        device = pick_device(accelerator if len(chosen) == 1 else "cpu")
        loaded = cls(source, source.model(dtype, device, quantize), tokenizer, style)
        if len(chosen) > 1:
            spread(loaded.model, chosen)
        return loaded

    def prepare(self, compile: bool = False, devices: int = 1) -> "InferenceModel":
        """Make inference fast: compile the blocks, or on a CPU change the layout of the weights and use as many threads
        as the model needs, of what `devices` processes share. The weights can then only be multiplied with. Raises
        `UserError` if what the compiler needs is not installed."""
        share_threads(self.model, self.device, devices)
        if compile:
            check_compiler(self.device)
            compile_blocks(self.model, decoding=True)
        prepack(self.model.lm_head if compile else self.model)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.tokenizer.stops(self.style)

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Optional[list] = None, limit: Optional[int] = None
    ) -> tuple[str, list[int]]:
        """The text that the answer to the last message follows, and its ids, as in training. `limit` and what is raised
        as in `Tokenizer.encode`."""
        text = self.style.prompt(messages, tools)
        return text, self.tokenizer.encode(text, not self.style.own_special_tokens, limit=limit)


def natural_precision(source: ModelSource, device: torch.device) -> str:
    """32-true for weights stored in float32, else bf16-true if the device computes it natively, else 32-true."""
    return "32-true" if stored_dtypes(source.checkpoint) == ["F32"] else default_precision(device)
