"""`litgpt ctl`"""

from pathlib import Path
from typing import Literal, Optional

from litgpt.errors import UserError
from litgpt.train.inbox import Command, is_live, send, wait
from litgpt.train.runs import find_run


def main(
    run: Path,
    action: Literal["save", "eval", "stop", "lr", "sample"],
    value: Optional[str] = None,
    timeout: float = 30,
) -> None:
    """Tell a live run to save, validate, answer a prompt, change its learning rate, or stop.

    The run follows the command after its current step, and records it in metrics.csv and run.lock. After lr, the
    schedule goes on with the new peak: it multiplies it as planned, so the rate of the next step is lower during warmup
    and decay. A resumed run keeps that rate. After stop, --resume true continues the run.

    Args:
        run: The output folder of a run.
        action: save (a checkpoint), eval (validate), stop (save and stop), lr RATE (set the peak learning rate), or
            sample PROMPT (answer a prompt).
        value: The learning rate, or the prompt.
        timeout: Seconds to wait for the answer of the run. The run follows the command in any case.
    """
    command = Command(action, value)
    command.check()
    out_dir = live_run(run)
    answer = wait(out_dir, send(out_dir, command), timeout)
    print(
        answer or f"The run in {out_dir} has not answered yet. It follows after its current step and prints the answer."
    )


def live_run(folder: Path) -> Path:
    """The folder of the run that is training there, or of the one that a result belongs to. Raises `UserError` if there
    is none."""
    for place in (folder, folder.absolute().parent):
        if is_live(place):
            return place
    state = find_run(folder).state
    raise UserError(
        f"The run in {folder} is {state}. Only a run that is running takes commands. To list runs: litgpt runs"
    )
