"""Runs that need more memory than there is: refused before their weights are loaded, or explained when it ran out."""

from typing import TYPE_CHECKING

from litgpt.errors import UserError
from litgpt.train.args import PlanArgs
from litgpt.train.devices.launch import CONTEXT
from litgpt.train.memory.plan import ladder, print_plan, rung_of, target_of

if TYPE_CHECKING:
    from litgpt.train.run import Run

SURELY = 1.05  # times the memory: a prediction above that is not just inexact


def check_fits(run: "Run") -> None:
    """Print the plan of a run and raise `UserError` if it needs more memory than its device has. Its rows are loaded,
    its weights are not."""
    target = target_of(None, run.device, run.devices_per_node)
    try:
        peak = rung_of(run, {}, target).prediction.peak
        if peak <= target.memory * SURELY:
            return
        if run.is_first:
            print_plan(run, target, ladder(run, target), PlanArgs())
    except RuntimeError:  # an operation that has no rule for fake tensors: the run itself will show
        return
    needed, there = (f"{n / 2**30:.1f} GiB" for n in (peak, target.memory))
    raise UserError(f"This run needs {needed} of memory, and {target.name} has {there}. Nothing was loaded.")


def explain(run: "Run") -> None:
    """Print the plan of a run that ran out of memory, without settings that take as much."""
    target = target_of(None, run.device, run.devices_per_node)
    peak = rung_of(run, {}, target).prediction.peak
    target = target._replace(memory=min(target.memory, peak + CONTEXT * target.is_gpu - 1))
    print_plan(run, target, ladder(run, target), PlanArgs())
