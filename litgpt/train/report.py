"""The summaries that a run prints before it starts and when it is done."""

import math
import shlex
from pathlib import Path
from typing import Optional

from litgpt.data.batches import PackedRows, Rows
from litgpt.data.tokens import Counts, TokenizedRows
from litgpt.train.args import TrainArgs
from litgpt.train.loop import Plan, Result, perplexity
from litgpt.train.method import Method
from litgpt.train.progress import Screen, duration, gigabytes


def describe_packs(rows: Rows) -> list[tuple[str, str]]:
    if not isinstance(rows, PackedRows):
        return []
    longest = int(rows.lengths.max())
    full = float(rows.lengths.float().mean()) / longest
    return [("packs", f"{len(rows):,} of at most {longest:,} tokens, {full:.1%} full")]


def describe_schedule(plan: Plan, train: TrainArgs, unit: str) -> str:
    """What ends the run, and the size of a step. `unit` is rows or packs."""
    step = f"of {train.global_batch_size} {unit} (about {plan.tokens_per_step:,.0f} tokens)"
    budget = [f"{plan.tokens:,} tokens"] if plan.tokens is not None else []
    budget += [f"{duration(plan.seconds)} of training"] if plan.seconds is not None else []
    limits = ([f"{plan.steps:,} steps"] if plan.steps is not None else []) + budget
    ending = f"{' or '.join(limits)}{', whichever comes first' if len(limits) > 1 else ''}"
    return f"{ending}{', steps' if budget else ''} {step}, micro-batch {train.micro_batch_size}"


def describe_learning_rate(peak: float, plan: Plan, train: TrainArgs) -> str:
    has_budget = plan.tokens is not None or plan.seconds is not None
    warmup = f"{plan.warmup:,} warmup steps{' (at most a tenth of the run)' * has_budget}, " if plan.warmup else ""
    warmup = f"warmup over {plan.fraction:.0%} of the run, " if plan.fraction else warmup
    if train.lr_schedule == "constant":
        return f"{warmup}learning rate {peak:g}, constant"
    end = f"step {plan.decay:,}" if plan.decay is not None else "the end"
    return f"{warmup}learning rate {peak:g}, {train.lr_schedule} to {train.min_lr:g} at {end}"


def describe_truncated_warmup(plan: Plan) -> list[str]:
    if plan.requested_warmup is None:
        return []
    what = "run" if (plan.decay or math.inf) >= (plan.steps or math.inf) else "decay"
    return [f"The warmup of {plan.requested_warmup} steps is longer than the {what}. Using {plan.warmup} steps."]


def describe_rows(rows: TokenizedRows) -> str:
    if not len(rows):
        return "none"
    return f"{len(rows):,} rows, {int(rows.lengths.sum()):,} tokens, longest {int(rows.lengths.max()):,}"


def describe_counts(counts: Counts) -> str:
    """How many rows were read, and how many of them were not used as they are."""
    forms = ", ".join(f"{n:,} {form}" for form, n in counts.forms.items())
    changed = {
        "dropped because they are too long": counts.too_long,
        "invalid and skipped": counts.bad,
        "skipped because of their label": counts.left_out,
    }
    more = "".join(f", {n:,} {what}" for what, n in changed.items() if n)
    skipped = f"{counts.untrained:,} skipped (no target tokens)"
    return f"{counts.rows:,} read ({forms}): {counts.cut:,} truncated, {skipped}{more}"


def report(screen: Screen, result: Result, method: Method, out_dir: Path, memory: Optional[int], plotted: bool) -> None:
    """Print the results of a finished run.

    Args:
        memory: Peak memory in bytes.
        plotted: Whether there is a plot of the losses.
    """
    losses = first_and_last([loss for _, loss in result.val_losses])
    rows = [
        ("training loss", f"{result.loss:.4f}"),
        ("validation loss", " -> ".join(f"{loss:.4f}" for loss in losses)),
        ("perplexity", " -> ".join(perplexity(loss) for loss in losses)),
        ("exact answers", " -> ".join(f"{score:.1%}" for score in result.scores)),
        ("time", f"{duration(result.seconds)} for {result.steps:,} steps"),
        ("speed", f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s, {result.tokens:,} tokens"),
        ("peak memory", gigabytes(memory)),
        ("result", str(out_dir / "final")),
        ("metrics", str(out_dir / "metrics.csv") + (f", {out_dir / 'loss.png'}" if plotted else "")),
    ]
    screen.table("Done", [(name, value) for name, value in rows if value])
    screen.say("Next:")
    for command in method.next_commands:
        screen.say("  " + command.format(final=shlex.quote(str(out_dir / "final"))))
    if method.remark:
        screen.say(method.remark)


def first_and_last(losses: list[float]) -> list[float]:
    return [losses[0], losses[-1]] if len(losses) > 1 else losses
