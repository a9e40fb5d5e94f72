"""`litgpt plan`"""

import os
from pathlib import Path
from typing import Optional

from litgpt.__main__ import COMMANDS
from litgpt.__main__ import main as run
from litgpt.cli.commands import members
from litgpt.cli.parser import parse
from litgpt.errors import UserError
from litgpt.train.args import PlanArgs, planning
from litgpt.train.memory.inference import plan_inference

ANSWERS = ("generate", "chat", "serve")
RUNS = (*members("finetune"), "finetune", "pretrain")


def main(
    command: list[str],
    gpu: Optional[str] = None,
    price: Optional[float] = None,
    utilization: Optional[float] = None,
    tokens: Optional[int] = None,
    measure: bool = False,
    apply: Optional[Path] = None,
) -> None:
    """Predict the memory and the time of a finetune or a pretrain, and find settings that fit; or the memory of a
    generate, a chat, or a serve.

    Pass the command and its options, as in litgpt plan finetune lora MODEL --data FILE --gpu '24 GB'. The run itself is
    rehearsed without computing anything, from config.json, the tokenizer and the rows; no weights are read.

    Args:
        command: The command to plan, with its options.
        gpu: The memory of a GPU, such as '24 GB', or its name, such as H100; by default the device of this machine.
        price: Price of an hour of all devices, for the cost of the run.
        utilization: Share of the GPU's peak that training reaches, such as 0.4, for the time of the run.
        tokens: Assume rows of this many tokens, instead of reading the data.
        measure: Also run two steps of the longest rows on the device of this machine, and compare.
        apply: YAML file to write the settings that make the run fit to, for --config.
    """
    words = [word.replace("-", "_") for word in command[:2]]
    answers = bool(words) and words[0] in ANSWERS
    if not answers and not {"_".join(words), *words[:1]} & {*RUNS}:
        raise UserError("Expected a command to plan, such as: litgpt plan finetune lora MODEL --data FILE")
    args = PlanArgs(gpu, price, utilization, tokens, measure, apply)
    check(args)
    token = planning.set(args)
    try:
        if answers:
            options = parse(COMMANDS[words[0]][0], words[0], command[1:])
            plan_inference(options.checkpoint_dir, options.precision, options.quantize, args)
        else:
            run(command)
    finally:
        planning.reset(token)


def check(args: PlanArgs) -> None:
    """Raise `UserError` for numbers that mean nothing, or if the settings cannot be written."""
    if args.measure and args.gpu is not None:
        raise UserError("--measure runs on this machine's device, and --gpu plans for another. Pass only one of them.")
    if args.price is not None and args.price < 0:
        raise UserError(f"--price {args.price} is below 0.")
    if args.utilization is not None and not 0 < args.utilization <= 1:
        raise UserError(f"--utilization {args.utilization} must be above 0 and at most 1.")
    if args.apply is not None and args.apply.exists():
        raise UserError(f"--apply: {args.apply} already exists. Choose another file.")
    if args.apply is not None and not os.access(args.apply.parent, os.W_OK):
        raise UserError(f"--apply: cannot write to the folder {args.apply.parent}.")
