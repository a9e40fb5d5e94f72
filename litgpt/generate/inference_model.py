"""A folder as a model that answers, and the options that the generating commands share."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch

from litgpt.errors import UserError
from litgpt.generate.answers import stop_strings
from litgpt.generate.engine import Request
from litgpt.generate.reference_outputs import stored_dtypes
from litgpt.generate.sampling import Sampling
from litgpt.generate.several_devices import DeviceCount, spread, usable_devices
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizeName
from litgpt.model.blocks import check_compiler, compile_blocks
from litgpt.model.devices import DTYPES, Accelerator, PrecisionName, default_precision, pick_device, share_threads
from litgpt.model.gpt import GPT
from litgpt.model.linear import prepack
from litgpt.text.prompts import PromptStyle
from litgpt.text.tokenizer import Tokenizer

DEFAULT_PROMPT = "What food do llamas eat?"


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
        path: Union[Path, ModelSource],
        base: Optional[Path] = None,
        precision: Optional[PrecisionName] = None,
        quantize: Optional[QuantizeName] = None,
        accelerator: Accelerator = "auto",
        devices: DeviceCount = 1,
        template_kwargs: Optional[Mapping[str, Any]] = None,
    ) -> "InferenceModel":
        """Load a folder, or the model of that name.

        Args:
            path: The folder, the name, or a source that is open already.
            base: Base model of the adapter, instead of the recorded one.
            precision: By default as `natural_precision`.
            devices: How many to spread the layers over. With several, the weights pass through the memory of the CPU.
            template_kwargs: Variables of the chat template.

        Raises:
            UserError: the folder cannot be used, or there are not as many devices, or quantized layers for several.
        """
        chosen = usable_devices(accelerator, devices)
        if len(chosen) > 1 and quantize is not None:
            raise UserError(f"--quantize {quantize} needs one device. It does not work with --devices {len(chosen)}.")
        source = path if isinstance(path, ModelSource) else ModelSource.open(path, base)
        tokenizer, style = source.tokenizer(), source.style()
        style = style.with_variables(template_kwargs, strict=True) if template_kwargs else style
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
        self,
        messages: Sequence[dict[str, Any]],
        tools: Optional[list] = None,
        limit: Optional[int] = None,
        variables: Optional[Mapping[str, Any]] = None,
        begun: str = "",
    ) -> tuple[str, list[int]]:
        """The text that the answer to the last message follows, and its ids, as in training. `variables` are those of
        the chat template, `begun` is the beginning of the answer. `limit` and what is raised as in `Tokenizer.encode`.
        """
        style = self.style.with_variables(variables) if variables else self.style
        text = style.prompt(messages, tools) + begun
        return text, self.tokenizer.encode(text, not self.style.own_special_tokens, limit=limit)


def natural_precision(source: ModelSource, device: torch.device) -> str:
    """32-true for weights stored in float32, else `default_precision`."""
    return "32-true" if stored_dtypes(source.checkpoint) == ["F32"] else default_precision(device)


# options that the generating commands share


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened for inference.

    Args:
        precision: Precision of the weights and activations. By default 32-true for weights stored in float32, else
            bf16-true if the device computes it natively, else 16-true on CUDA GPUs, else 32-true.
        quantize: Quantize the weights of the blocks to 4 or 8 bits with bitsandbytes; mxfp4 keeps the
            experts of gpt-oss in the 4 bits of its files.
        compile: Compile the blocks of the model. The start takes longer, each token less time.
        accelerator: Type of device to run on.
        devices: Number of devices to spread the layers over, one after the other; auto for all.
        base: Base model of the adapter, instead of the recorded one.
        template_kwargs: Variables for the chat template, such as {enable_thinking: false}.
    """

    precision: Optional[PrecisionName] = None
    quantize: Optional[QuantizeName] = None
    compile: bool = False
    accelerator: Accelerator = "auto"
    devices: DeviceCount = 1
    base: Optional[Path] = None
    template_kwargs: Optional[dict[str, Any]] = None

    def open(self, path: Path) -> InferenceModel:
        """As `InferenceModel.open`. The model still has to be prepared."""
        options = {name: value for name, value in vars(self).items() if name != "compile"}
        return InferenceModel.open(path, **options)


@dataclass(frozen=True)
class PromptOptions:
    """A prompt, and what is generated for it.

    Args:
        prompt: Text to continue or to answer. - reads it from stdin, and so does a pipe if no prompt is given.
        input: Input for the instruction in the prompt, as in Alpaca's rows. - reads it from stdin.
        sys_prompt: System message before the prompt.
        num_samples: Number of answers to each prompt.
        max_new_tokens: Maximum number of tokens in an answer. By default the model answers until it stops, or its
            context is full.
        stop: Text that ends the answer, or a JSON list of several. The answer does not include it.
        seed: Random seed. The same seed gives the same answers.

    Raises:
        UserError: an option is out of range.
    """

    prompt: str = DEFAULT_PROMPT
    input: str = ""
    sys_prompt: Optional[str] = None
    num_samples: int = 1
    max_new_tokens: Optional[int] = None
    stop: Optional[Union[str, list[str]]] = None
    seed: int = 1234
    stop_strings: list[str] = field(init=False)  # what `stop` means

    def __post_init__(self) -> None:
        check_positive(num_samples=self.num_samples, max_new_tokens=self.max_new_tokens)
        object.__setattr__(self, "stop_strings", stop_strings(self.stop))

    def render(self, model: InferenceModel) -> tuple[str, list[int]]:
        """The prompt as the model reads it, as text and as ids."""
        system = [{"role": "system", "content": self.sys_prompt}] if self.sys_prompt else []
        return model.render([*system, {"role": "user", "content": self.prompt, "input": self.input}])

    def requests(
        self, ids: Sequence[int], sampling: Sampling, stop_ids: Collection[int], number: int = 0
    ) -> list[Request]:
        """A request for each answer to the prompt of this number."""
        first = self.seed + number * self.num_samples
        return [Request(ids, self.max_new_tokens, sampling, stop_ids, first + i) for i in range(self.num_samples)]


def check_positive(**options: Optional[int]) -> None:
    """Raises `UserError` if options are not above 0, for all of them at once. None is allowed."""
    wrong = [f"--{name} {value}" for name, value in options.items() if value is not None and value < 1]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: expected a number above 0.")
