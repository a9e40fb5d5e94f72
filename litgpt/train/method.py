"""What one finetuning method adds to the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from litgpt.model import GPT


@dataclass
class Method:
    """A finetuning method.

    Args:
        name: As in `litgpt finetune NAME`.
        apply: Changes a model that was just built (its weights are not read yet) in place, and leaves
            `requires_grad` on what is to be trained.
        save: Writes what was trained. Gets the model, the base model (its repository id or its absolute path), and
            the folder.
        next_commands: What to try with the finished folder, each with `{final}` for its path.
    """

    name: str
    apply: Callable[[GPT], None]
    save: Callable[[GPT, str, Path], None]
    next_commands: tuple[str, ...] = ()
