"""What distinguishes one finetuning method from another."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from litgpt.model import GPT
from litgpt.train.base_model import BaseModel

RESULT_COMMANDS = ('litgpt generate {final} --prompt "..."', "litgpt validate {final}")


@dataclass
class Method:
    """A finetuning method: what is trained and how it is saved.

    Args:
        name: The command, such as `finetune lora`.
        apply: Modifies a newly built model in place, before its weights are loaded. Sets `requires_grad` on what is
            trained.
        save: Writes what was trained. Takes the model, the base model, and the folder.
        saves_style: Whether the result records the prompt style of the training rows.
        next_commands: Commands to suggest at the end, with `{final}` for the folder of the result.
        remark: A note about that folder.
    """

    name: str
    apply: Callable[[GPT], None]
    save: Callable[[GPT, BaseModel, Path], None]
    saves_style: bool = True
    next_commands: tuple[str, ...] = ()
    remark: str = ""
