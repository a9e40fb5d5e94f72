"""How long a run takes, how far it is, and its learning rate."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from litgpt.data.batches import Rows
from litgpt.errors import UserError
from litgpt.train.args import AUTO, EvalArgs, IntOrAuto, TrainArgs
from litgpt.train.metrics import Event

Schedule = Literal["cosine", "linear", "constant"]
WARMUP_STEPS = 100  # at most, if --train.lr_warmup_steps is auto
AUTO_PARTS = 10  # a run has about this many validations and checkpoints, if their interval is auto
MIN_SECONDS, MAX_SECONDS = 60, 600  # of training between such checkpoints
NEW_PROGRESS: dict[str, Any] = {
    "val_metrics": [],
    "events": [],
}  # fields of `Result` that older checkpoints do not have
RENAMED_PROGRESS = {"judged": "last_eval_step"}  # fields of `Result` that older checkpoints have by another name


@dataclass
class Result:
    """The progress of a run, and its result. Losses are in nats per target token."""

    steps: int = 0  # optimizer steps
    seen: int = 0  # rows (or packs) trained on
    tokens: int = 0  # read
    seconds: float = 0.0  # of training
    loss: float = math.nan  # of the last step
    val_losses: list[tuple[int, float]] = field(default_factory=list)  # pairs of step and validation loss
    val_metrics: list[dict[str, float]] = field(default_factory=list)  # of an objective that has some, for each of them
    last_eval_step: int = 0  # step of the last validation during training
    best: float = math.inf  # of the validations during training, which may read fewer rows than the others
    since_best: int = 0  # validations since then
    early: bool = False  # whether early stopping ended the run
    scores: list[float] = field(default_factory=list)  # fraction of exact answers, each time it was measured
    events: list[Event] = field(default_factory=list)  # commands of `litgpt ctl`, with the steps after which they came


class Plan:
    """The limits of a run, of which the first one reached ends it, and its learning rate.

    How many steps fit into a token or time budget shows only during the run. Until then the learning rate and the
    progress follow an estimate, which is exact at the end. `warmup_steps` limits the warmup if the options leave it
    to the run.

    `steps` is None if only tokens or time end the run. `fraction`, if set, replaces `warmup`. `requested_warmup` is set
    if the warmup of the options was truncated because the run is shorter. `decay` is the step at which the learning
    rate reaches its minimum; None for the last one. `tokens_per_step` is an average over all rows. `done` is the
    progress of a run that resumes.
    """

    def __init__(
        self, train: TrainArgs, rows: Rows, warmup_steps: int = WARMUP_STEPS, done: Optional[Result] = None
    ) -> None:
        limits, done = [train.max_steps] if train.max_steps else [], done or Result()
        if train.epochs is not None:  # the last step before an extension may have had fewer rows than others
            left = len(rows) * train.epochs - done.seen
            limits.append(done.steps + max(0, math.ceil(left / train.global_batch_size)))
        self.steps = min(limits) if limits else None
        self.tokens, self.seconds = train.max_tokens, train.max_time
        self.has_budget = self.tokens is not None or self.seconds is not None
        self.fraction = train.lr_warmup_fraction if self.has_budget else None
        warmup = warmup_steps if train.lr_warmup_steps == AUTO else train.lr_warmup_steps or 0
        if train.lr_warmup_fraction is not None:
            warmup = 0 if self.has_budget or self.steps is None else round(train.lr_warmup_fraction * self.steps)
        self.decay = train.lr_decay_iters or (None if self.has_budget else self.steps)
        end = min(self.steps or math.inf, self.decay or math.inf)
        is_auto = train.lr_warmup_steps == AUTO and train.lr_warmup_fraction is None
        self.requested_warmup = warmup if warmup > end and not is_auto else None
        most = end / 10 if is_auto else end
        self.warmup = int(end / 10) if warmup > most else warmup
        self.tokens_per_step = float(rows.lengths.float().mean()) * train.global_batch_size

    def steps_in_budget(self, result: Result) -> float:
        """The estimated number of steps that the tokens and the time allow; infinite without such a limit."""
        estimates = [math.inf]
        if self.tokens is not None:
            estimates.append(self.tokens / (result.tokens / result.steps if result.steps else self.tokens_per_step))
        if self.seconds is not None and result.seconds:
            estimates.append(self.seconds / result.seconds * result.steps)
        return min(estimates)

    def total_steps(self, result: Result) -> float:
        """The steps of the whole run, an estimate if tokens or time may end it."""
        return min(self.steps or math.inf, self.steps_in_budget(result))

    def learning_rate(self, result: Result, peak: float, least: float, schedule: Schedule) -> float:
        """The learning rate of the next step."""
        total, warmup = self.total_steps(result), min(self.warmup, self.steps_in_budget(result) / 10)
        if self.fraction is not None:
            warmup = self.fraction * total if self.fraction else 0
        return learning_rate(result.steps, self.decay or total, warmup, peak, least, schedule)

    def is_validation_due(self, interval: IntOrAuto, result: Result) -> bool:
        if interval == AUTO:
            return result.steps - result.last_eval_step >= self.total_steps(result) / AUTO_PARTS
        return result.steps % interval == 0

    def is_checkpoint_due(self, result: Result, steps: int, seconds: float) -> bool:
        """Whether it is time to save a checkpoint, this many steps and seconds after the last one, if their interval is
        auto."""
        return seconds >= MAX_SECONDS or (seconds >= MIN_SECONDS and steps >= self.total_steps(result) / AUTO_PARTS)

    def check_patience(self, args: EvalArgs) -> None:
        """Raise `UserError` if early stopping cannot happen: the first validation sets the best loss, and then as many
        as the patience have to come before the last step."""
        total, patience = self.total_steps(Result()), args.early_stopping_patience
        if patience is None or not math.isfinite(total):
            return
        interval = math.ceil(total / AUTO_PARTS) if args.interval == AUTO else args.interval
        n = (math.ceil(total) - 1) // interval
        if n > patience:
            return
        often = (math.ceil(total) - 1) // (patience + 1)
        remedies = ([f"--eval.interval {often}"] if often else []) + ["a longer run"]
        remedies += [f"--eval.early_stopping_patience {n - 1}"] if n > 1 else []
        raise UserError(
            f"--eval.early_stopping_patience {patience} can never stop this run early: that takes {patience + 1} "
            f"validations, and the run of {math.ceil(total):,} steps has {n}, one every {interval:,} steps "
            f"(--eval.interval). Use {' or '.join(remedies)}."
        )

    def is_done(self, result: Result) -> bool:
        limits = ((result.steps, self.steps), (result.tokens, self.tokens), (result.seconds, self.seconds))
        return any(limit is not None and used >= limit for used, limit in limits)

    def fraction_done(self, result: Result) -> float:
        return min(1.0, result.steps / self.total_steps(result))

    def position(self, result: Result) -> str:
        """The current step, as log lines show it."""
        if self.steps is not None and self.steps <= self.steps_in_budget(result):
            return f"step {result.steps}/{self.steps}"
        return f"step {result.steps} ({self.fraction_done(result):.0%})"


def learning_rate(
    step: int, total: float, warmup: float, peak: float, least: float, schedule: Schedule = "cosine"
) -> float:
    """The learning rate of optimizer step `step`, counted from 0: rises linearly to `peak` over the first `warmup`
    steps, then decays to `least` at step `total`, along a cosine (https://arxiv.org/abs/1608.03983) or a line, or stays
    at `peak`. `total` and `warmup` may be estimates: fractional or infinite."""
    if step < warmup:
        return peak * min(step + 1, warmup) / warmup if warmup < math.inf else 0.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
    return least + (peak - least) * remaining
