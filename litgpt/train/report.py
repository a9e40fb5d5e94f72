"""What a run says about itself: one screen before it starts, and the figures at its end."""

import math
import shlex
from pathlib import Path
from typing import Optional

from litgpt.data.base import TokenizedDataset
from litgpt.data.batches import PackedRows, Rows
from litgpt.data.tokens import Counts, TokenizedRows
from litgpt.model import GPT
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.base_model import BaseModel
from litgpt.train.loop import Plan, Result, perplexity
from litgpt.train.method import Method
from litgpt.train.progress import Screen, duration, gigabytes


def print_header(
    screen: Screen,
    method: Method,
    start: BaseModel,
    model: GPT,
    n_all: int,
    loaded: TokenizedDataset,
    train_rows: Rows,
    plan: Plan,
    train: TrainArgs,
    on: str,
    out_dir: Path,
    schedule: list[tuple[str, str]],
) -> None:
    """One screen: model, parameters, data, plan."""
    config, counts = start.config, loaded.counts
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    unit = "packs" if isinstance(train_rows, PackedRows) else "rows"
    rows = [
        ("model", f"{start.name} ({config.model_type}, {config.n_layer} layers, width {config.n_embd})"),
        ("parameters", f"{n_trained:,} trainable of {n_all:,} ({n_trained / n_all:.2%})"),
        ("rows", describe_counts(counts) + ("; tokens from the cache" if loaded.cached else "")),
        ("training", describe(loaded.train)),
        ("validation", describe(loaded.val)),
        ("prompt style", f"{loaded.style.name}; trained: {'answers' if loaded.mask_prompt else 'prompts and answers'}"),
        ("plan", describe_plan(plan, train, unit)),
        *schedule,
        ("on", on),
        ("writes to", str(out_dir)),
    ]
    if isinstance(train_rows, PackedRows):
        full = float(train_rows.lengths.float().mean()) / int(train_rows.lengths.max())
        rows.insert(
            5, ("packs", f"{len(train_rows):,} of at most {int(train_rows.lengths.max()):,} tokens, {full:.1%} full")
        )
    screen.table(f"litgpt {method.name}", rows)
    if plan.cut_warmup is not None:
        what = "run" if (plan.decay or math.inf) >= (plan.steps or math.inf) else "decay"
        screen.say(f"The warm-up of {plan.cut_warmup} steps is longer than the {what}; it is cut to {plan.warmup}.")


def describe_plan(plan: Plan, train: TrainArgs, unit: str) -> str:
    """What ends the run, and what a step is."""
    step = f"of {train.global_batch_size} {unit} (about {plan.tokens_of_a_step:,.0f} tokens)"
    budget = [f"{plan.tokens:,} tokens"] if plan.tokens is not None else []
    budget += [f"{duration(plan.seconds)} of training"] if plan.seconds is not None else []
    limits = ([f"{plan.steps:,} steps"] if plan.steps is not None else []) + budget
    words = f"{' or '.join(limits)}{', whichever comes first' if len(limits) > 1 else ''}"
    return f"{words}{', steps' if budget else ''} {step}, micro-batch {train.micro_batch_size}"


def describe_rate(rate: float, plan: Plan, train: TrainArgs) -> str:
    """The way of the learning rate."""
    budget = plan.tokens is not None or plan.seconds is not None
    start = f"{plan.warmup:,} steps of warm-up{', at most a tenth of the run' * budget}, " if plan.warmup else ""
    start = f"warm-up in {plan.fraction:.0%} of the run, " if plan.fraction else start
    if train.lr_schedule == "constant":
        return f"{start}learning rate {rate:g}, constant"
    end = f"step {plan.decay:,}" if plan.decay is not None else "the end"
    return f"{start}learning rate {rate:g}, {train.lr_schedule} to {train.min_lr:g} at {end}"


def describe_stop(eval: EvalArgs) -> list[tuple[str, str]]:
    if eval.early_stopping_patience is None:
        return []
    return [("stops early", f"after {eval.early_stopping_patience} validations in turn without a new best")]


def describe(rows: TokenizedRows) -> str:
    if not len(rows):
        return "none"
    return f"{len(rows):,} rows, {int(rows.lengths.sum()):,} tokens, longest {int(rows.lengths.max()):,}"


def describe_counts(counts: Counts) -> str:
    """What was read, and what became of it."""
    forms = ", ".join(f"{n:,} {form}" for form, n in counts.forms.items())
    others = {
        "dropped as too long": counts.too_long,
        "bad and skipped": counts.bad,
        "skipped by their label": counts.skipped,
    }
    more = "".join(f", {n:,} {what}" for what, n in others.items() if n)
    return (
        f"{counts.rows:,} read ({forms}): {counts.truncated:,} truncated, {counts.no_targets:,} without targets{more}"
    )


def report(
    screen: Screen,
    result: Result,
    method: Method,
    out_dir: Path,
    memory: Optional[int],
    drawn: bool,
    scores: list[float],
) -> None:
    losses = " -> ".join(f"{loss:.4f}" for loss in ends(result.val_losses))
    perplexities = " -> ".join(perplexity(loss) for loss in ends(result.val_losses))
    rows = [
        ("training loss", f"{result.loss:.4f}"),
        *([("validation loss", losses), ("perplexity", perplexities)] if losses else []),
        *([("exact answers", " -> ".join(f"{score:.1%}" for score in scores))] if scores else []),
        ("time", f"{duration(result.seconds)} for {result.steps:,} steps"),
        ("speed", f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s, {result.tokens:,} tokens"),
        ("peak memory", gigabytes(memory)),
        ("result", str(out_dir / "final")),
        ("numbers", str(out_dir / "metrics.csv") + (f", {out_dir / 'loss.png'}" if drawn else "")),
    ]
    screen.table("Done", rows)
    screen.say("Next:")
    for command in method.next_commands:
        screen.say("  " + command.format(final=shlex.quote(str(out_dir / "final"))))
    if method.remark:
        screen.say(method.remark)


def ends(losses: list[tuple[int, float]]) -> list[float]:
    """The first and the last of the validation losses."""
    values = [loss for _, loss in losses]
    return [values[0], values[-1]] if len(values) > 1 else values
