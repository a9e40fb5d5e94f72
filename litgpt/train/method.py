"""What one finetuning method adds to the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from litgpt.model import GPT
from litgpt.train.base_model import BaseModel

ADAPTER_COMMANDS = ('litgpt generate {final} --prompt "..."', "litgpt validate {final}")


@dataclass
class Method:
    """A way of training.

    Args:
        name: The command, as `finetune lora`.
        apply: Changes a model that was just built (its weights are not read yet) in place, and leaves
            `requires_grad` on what is to be trained.
        save: Writes what was trained. Gets the model, where it started, and the folder.
        saves_style: Whether the prompt style of the rows becomes that of the result.
        next_commands: What to try with the finished folder, each with `{final}` for its path.
        remark: What else has to be known about that folder.
    """

    name: str
    apply: Callable[[GPT], None]
    save: Callable[[GPT, BaseModel, Path], None]
    saves_style: bool = True
    next_commands: tuple[str, ...] = ()
    remark: str = ""
