"""What distinguishes one finetuning method from another."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.train.base_model import BaseModel
from litgpt.train.objectives import Objective
from litgpt.train.schedule import WARMUP_STEPS

Save = Callable[[GPT, BaseModel, Path], None]
USE_COMMANDS = ("litgpt serve {folder}", "litgpt generate {folder} --prompt {prompt}")
RESULT_COMMANDS = ("litgpt chat {folder}", *USE_COMMANDS, "litgpt evaluate {folder} --vs base")
EXPORT_COMMAND = "litgpt export {folder}"


@dataclass
class Method:
    """A finetuning method: what is trained, what is minimized, and how the result is saved.

    `apply` modifies a newly built model in place, before its weights are loaded, and sets `requires_grad` on what is
    trained. `save` writes that, given the model, the base model, and the folder. `finish` changes the model after the
    last step, and returns how to save the result; by default that is `save`, which is exact.
    """

    name: str  # the command, such as `finetune lora`
    apply: Callable[[GPT], None]
    save: Save
    objective: Objective = field(default_factory=Objective)
    finish: Optional[Callable[[GPT, BaseModel], Save]] = None
    saves_style: bool = True  # whether the result records the prompt style of the training rows
    next_commands: tuple[str, ...] = ()  # to suggest at the end, with the result's `{folder}` and a `{prompt}`
    remark: str = ""  # a note about that folder
    notes: Callable[[GPT], list[str]] = lambda model: []  # on the model as changed by `apply`, before the first step
    learning_rate: Optional[Callable[[int], float]] = None  # the default for a model's width; None for the optimizer's
    warmup_steps: int = WARMUP_STEPS  # at most, if --train.lr_warmup_steps is auto

    def check_quantize(self, quantize: Optional[str], frozen: bool) -> None:
        if quantize is not None and not frozen:
            raise UserError(f"--quantize {quantize} needs frozen weights, but {self.name} trains all of them.")
