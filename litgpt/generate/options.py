"""Options that the generating commands share: how a model is opened, and what it is asked."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

from litgpt.errors import UserError
from litgpt.generate.answers import stop_strings
from litgpt.generate.engine import Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.generate.sequentially import DeviceCount
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName

DEFAULT_PROMPT = "What food do llamas eat?"


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened for inference.

    Args:
        precision: Precision of the weights and activations. By default 32-true for weights stored in float32, else
            bf16-true if the device computes it natively, else 32-true.
        quantize: Quantize the weights of the blocks to 4 or 8 bits with bitsandbytes.
        compile: Compile the blocks of the model. The start takes longer, each token less time.
        accelerator: Type of device to run on.
        devices: Number of devices to spread the layers over, one after the other; auto for all.
        base: Base model of the adapter, instead of the recorded one.
    """

    precision: Optional[PrecisionName] = None
    quantize: Optional[QuantizeName] = None
    compile: bool = False
    accelerator: Accelerator = "auto"
    devices: DeviceCount = 1
    base: Optional[Path] = None

    def open(self, path: Path) -> InferenceModel:
        """As `InferenceModel.open`. The model still has to be prepared."""
        return InferenceModel.open(path, self.base, self.precision, self.quantize, self.accelerator, self.devices)


@dataclass(frozen=True)
class PromptOptions:
    """A prompt, and what is generated for it.

    Args:
        prompt: Text to continue or to answer. - reads it from stdin, and so does a pipe if no prompt is given.
        input: Input for the instruction in the prompt, as in Alpaca's rows. - reads it from stdin.
        sys_prompt: System message before the prompt.
        num_samples: Number of answers to each prompt.
        max_new_tokens: Maximum number of tokens in an answer.
        stop: Text that ends the answer, or a JSON list of several. The answer does not include it.
        seed: Random seed. The same seed gives the same answers.

    Raises:
        UserError: an option is out of range.
    """

    prompt: str = DEFAULT_PROMPT
    input: str = ""
    sys_prompt: Optional[str] = None
    num_samples: int = 1
    max_new_tokens: int = 50
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


def check_positive(**options: int) -> None:
    """Raises `UserError` if options are not above 0, for all of them at once."""
    wrong = [f"--{name} {value}" for name, value in options.items() if value < 1]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: expected a number above 0.")
