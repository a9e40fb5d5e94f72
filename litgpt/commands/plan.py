"""`litgpt plan`"""

import os
from pathlib import Path
from typing import Optional

from litgpt.__main__ import main as run
from litgpt.errors import UserError
from litgpt.train.args import PlanArgs, planning

RUNS = ("finetune_lora", "finetune_full", "finetune_adapter", "finetune_adapter_v2", "pretrain")


def main(
    command: list[str],
    gpu: Optional[str] = None,
    price: Optional[float] = None,
    utilization: Optional[float] = None,
    tokens: Optional[int] = None,
    apply: Optional[Path] = None,
) -> None:
    """Predict the memory and the time of a finetune or a pretrain, and find settings that fit.

    Pass the command and its options, as in litgpt plan finetune lora MODEL --data FILE --gpu '24 GB'. The run itself is
    rehearsed without computing anything, from config.json, the tokenizer and the rows; no weights are read.

    Args:
        command: The command to plan, with its options.
        gpu: The memory of a GPU, such as '24 GB', or its name, such as H100; by default the device of this machine.
        price: Price of an hour, for the cost of the run.
        utilization: Share of the GPU's peak that training reaches, such as 0.4, for the time of the run.
        tokens: Assume rows of this many tokens, instead of reading the data.
        apply: YAML file to write the settings that make the run fit to, for --config.
    """
    words = [word.replace("-", "_") for word in command[:2]]
    if not {"_".join(words), *words[:1]} & {*RUNS, "finetune"}:
        raise UserError("Expected a command to plan, such as: litgpt plan finetune lora MODEL --data FILE")
    args = PlanArgs(gpu, price, utilization, tokens, apply)
    check(args)
    token = planning.set(args)
    try:
        run(command)
    finally:
        planning.reset(token)


def check(args: PlanArgs) -> None:
    """Raise `UserError` for numbers that mean nothing, or if the settings cannot be written."""
    if args.price is not None and args.price < 0:
        raise UserError(f"--price {args.price} is below 0.")
    if args.utilization is not None and not 0 < args.utilization <= 1:
        raise UserError(f"--utilization {args.utilization} must be above 0 and at most 1.")
    if args.apply is not None and args.apply.exists():
        raise UserError(f"--apply: {args.apply} already exists. Choose another file.")
    if args.apply is not None and not os.access(args.apply.parent, os.W_OK):
        raise UserError(f"--apply: cannot write to the folder {args.apply.parent}.")
