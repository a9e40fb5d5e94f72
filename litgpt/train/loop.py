"""The one training loop.

The loss of a step is the sum over its trained tokens divided by their number, over all micro-batches and all ranks.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Optional

import torch
from torch.optim import Optimizer

from litgpt.data.batches import Batch, Rows, micro_batches, steps_of_rows
from litgpt.model.devices import peak_memory
from litgpt.model.sharded import local_shard, total_norm
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.faults import all_finite
from litgpt.train.flops import FlopCounter
from litgpt.train.metrics import Metrics
from litgpt.train.progress import Screen
from litgpt.train.schedule import Schedule, learning_rate
from litgpt.train.signals import Signals, Stopped

if TYPE_CHECKING:
    from lightning.fabric import Fabric


WARMUP_AT_MOST = 10  # the inverse of the share of a run that warms up at most, where tokens or time may end it
PAUSED = 75  # the exit code of a run that --train.pause_after ended, as for SIGUSR1


@dataclass
class Plan:
    """What ends a run, whichever comes first, and the way of its learning rate until then.

    How many steps fit into a time or a number of tokens shows while the run goes on: the learning rate, and what the
    screen shows, then follow an estimate, which is right at the end.

    Args:
        steps: Optimizer steps at which it ends; None where only tokens or time end it.
        warmup: How many of them warm up.
        decay: The step at which the learning rate is at its least; None for the last one.
        cut_warmup: The warm-up that was asked for, if it was longer than the run and had to be cut.
        fraction: The share of the run that warms up, instead of `warmup`.
        tokens: Tokens at which the run ends.
        seconds: Seconds of training at which it ends.
        tokens_of_a_step: On average, in all rows.
    """

    steps: Optional[int]
    warmup: int
    decay: Optional[int]
    cut_warmup: Optional[int] = None
    fraction: Optional[float] = None
    tokens: Optional[int] = None
    seconds: Optional[float] = None
    tokens_of_a_step: float = math.nan

    @classmethod
    def make(cls, train: TrainArgs, rows: Rows) -> "Plan":
        limits = [train.max_steps] if train.max_steps else []
        if train.epochs is not None:
            limits.append(math.ceil(len(rows) * train.epochs / train.global_batch_size))
        steps = min(limits) if limits else None
        budget = train.max_tokens is not None or train.max_time is not None
        wanted, fraction = train.lr_warmup_steps or 0, train.lr_warmup_fraction if budget else None
        if train.lr_warmup_fraction is not None:
            wanted = 0 if budget or steps is None else round(train.lr_warmup_fraction * steps)
        decay = train.lr_decay_iters or (None if budget else steps)
        end = min(steps or math.inf, decay or math.inf)
        cut = (int(end) // 10, wanted) if wanted > end else (wanted, None)
        tokens_of_a_step = float(rows.lengths.float().mean()) * train.global_batch_size
        return cls(steps, cut[0], decay, cut[1], fraction, train.max_tokens, train.max_time, tokens_of_a_step)

    def within_budget(self, done: "Result") -> float:
        """About how many steps the tokens and the time allow; infinite where nothing says so."""
        found = [math.inf]
        if self.tokens is not None:
            found.append(self.tokens / (done.tokens / done.steps if done.steps else self.tokens_of_a_step))
        if self.seconds is not None and done.seconds:
            found.append(self.seconds / done.seconds * done.steps)
        return min(found)

    def total(self, done: "Result") -> float:
        """The steps of the whole run, an estimate where tokens or time may end it."""
        return min(self.steps or math.inf, self.within_budget(done))

    def rate(self, done: "Result", peak: float, least: float, schedule: Schedule) -> float:
        """The learning rate of the next step."""
        total, warmup = self.total(done), min(self.warmup, self.within_budget(done) / WARMUP_AT_MOST)
        if self.fraction is not None:
            warmup = self.fraction * total if self.fraction else 0
        return learning_rate(done.steps, self.decay or total, warmup, peak, least, schedule)

    def over(self, done: "Result") -> bool:
        """Whether one of the limits is reached."""
        limits = ((done.steps, self.steps), (done.tokens, self.tokens), (done.seconds, self.seconds))
        return any(limit is not None and used >= limit for used, limit in limits)

    def share(self, done: "Result") -> float:
        """How much of the run is done, from 0 to 1, by the limit that will end it first."""
        return min(1.0, done.steps / self.total(done))

    def place(self, done: "Result") -> str:
        """Where the run is, in words."""
        if self.steps is not None and self.steps <= self.within_budget(done):
            return f"step {done.steps}/{self.steps}"
        return f"step {done.steps} ({self.share(done):.0%})"


@dataclass
class Result:
    """What a run has done so far. Losses are in nats per trained token.

    Args:
        steps: Optimizer steps.
        seen: Rows (or packs) that were trained on.
        tokens: Those that were read.
        seconds: Those of training.
        loss: Of the last logged step.
        val_losses: Pairs of step and loss.
        judged: The last step after which the model was validated within the run.
        best: The lowest loss of the validations within the run, which may read fewer rows than the others.
        since_best: How many validations ago that was.
        early: Whether the run ended before its plan.
        scores: The share of exact answers, each time it was counted.
    """

    steps: int = 0
    seen: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    val_losses: list[tuple[int, float]] = field(default_factory=list)
    judged: int = 0
    best: float = math.inf
    since_best: int = 0
    early: bool = False
    scores: list[float] = field(default_factory=list)


def fit(
    fabric: "Fabric",
    model: Any,
    optimizer: Optimizer,
    train_rows: Rows,
    val_rows: Rows,
    plan: Plan,
    train: TrainArgs,
    evaluate: EvalArgs,
    seed: int,
    screen: Screen,
    metrics: Metrics,
    result: Result,
    signals: Signals,
    save: Callable[[str], None],
    fail: Callable[[int, list[int], float, float], BaseException],
    work: Optional[FlopCounter],
    meet: Callable[[Batch], None] = lambda batch: None,
) -> Result:
    """Train.

    Args:
        model: A `LossModel`, set up by `fabric`, like the optimizer.
        result: What an earlier part of the run has done; it is carried on.
        signals: Asks for the end of the run after a step.
        save: Called with the name of a checkpoint: step-000012 or best.
        fail: Makes the error for a step that is not finite, from its number, rows, loss and norm of the gradient.
            Called on all ranks.
        work: What a token costs, and what the machine can do; None where that is not known.
        meet: Called with each batch before it is run.

    Raises:
        Stopped: the run was asked to end, and has saved.
    """
    size, ranks = train.micro_batch_size, (fabric.global_rank, fabric.world_size)
    peak = peak_rate(optimizer, train)
    first = result.steps
    signals.holds = True

    def batches(rows: list[int], source: Rows) -> Iterator[Batch]:
        return (source.batch(part).to(fabric.device) for part in micro_batches(rows, size, *ranks))

    def met(parts: Iterable[Batch]) -> Iterator[Batch]:
        for batch in parts:
            meet(batch)
            yield batch

    def judge(max_iters: Optional[int] = None) -> float:
        parts = itertools.islice(batches(list(range(len(val_rows))), val_rows), max_iters)
        loss = validate(fabric, model, met(parts), signals)
        if loss is None:
            stop()
        result.val_losses.append((result.steps, loss))
        metrics.write(step=result.steps, val_loss=loss, tokens=result.tokens, seconds=round(result.seconds, 3))
        screen.say(f"{plan.place(result)} | validation loss {loss:.4f} | perplexity {perplexity(loss)}")
        return loss

    def over() -> bool:
        """Validate if that is due; whether the run ends here."""
        if result.early or plan.over(result):
            return True
        if not len(val_rows) or result.steps % evaluate.interval or result.judged == result.steps:
            return False
        loss = judge(evaluate.max_iters)
        result.judged = result.steps
        result.best, result.since_best = (loss, 0) if loss < result.best else (result.best, result.since_best + 1)
        if train.save_best and not result.since_best:
            keep("best")
        if result.since_best == evaluate.early_stopping_patience:
            screen.say(f"The run stops here: {result.since_best} validations without a loss below {result.best:.4f}.")
            result.early = True
        return result.early

    def keep(name: str) -> None:
        metrics.flush()
        save(name)

    def stop() -> NoReturn:
        screen.stop()
        if result.steps:
            keep(f"step-{result.steps:06d}")
        raise Stopped(signals.code if fabric.is_global_zero else 0)  # the launcher kills all when another one fails

    def paused() -> bool:
        return train.pause_after is not None and result.steps - first >= train.pause_after

    longest = train_rows.batch(train_rows.longest(size))
    meet(longest)
    memory_dry_run(fabric, model, optimizer, longest.to(fabric.device))
    if evaluate.initial_validation and len(val_rows) and not result.steps:
        judge()
    screen.start(plan.share(result))
    tokens_then, seconds_then, targets = result.tokens, result.seconds, 0
    order = steps_of_rows(len(train_rows), train.global_batch_size, train.epochs, seed)
    coming = ((rows, list(batches(rows, train_rows))) for rows in itertools.islice(order, result.steps, plan.steps))
    following = next(coming, None)
    while following is not None:
        if result.steps and over():
            break
        rows, parts = following
        step, began = result.steps + 1, time.perf_counter()
        lr = plan.rate(result, peak, train.min_lr, train.lr_schedule)
        # ------------------------------------------------------------------------------------------------ the step
        counts = torch.tensor([sum(b.n_target_tokens for b in parts), signals.code], device=fabric.device)
        trained, asked = summed(fabric, counts).tolist()
        loss = torch.zeros((), device=fabric.device)
        for i, batch in enumerate(met(parts)):
            with fabric.no_backward_sync(model, enabled=i + 1 < len(parts)):
                part = model(batch) / trained
                fabric.backward(part * fabric.world_size)  # gradients are averaged over ranks
            loss += part.detach()
        following = next(coming, None)  # while the device is at work
        norm = clip(fabric, model, optimizer, train.max_norm)
        result.loss = float(summed(fabric, loss))
        if not all_finite(result.loss, norm):
            raise fail(step, rows, result.loss, float(norm))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()
        # --------------------------------------------------------------------------------------------------------
        result.steps = step
        result.seen += len(rows)
        result.tokens += int(train_rows.lengths[rows].sum())
        result.seconds += time.perf_counter() - began
        if plan.seconds is not None:  # the first rank's clock decides for all
            result.seconds = fabric.broadcast(result.seconds)
        targets += trained
        if step % train.log_interval == 0 or plan.over(result):
            tokens, seconds = result.tokens - tokens_then, result.seconds - seconds_then
            mfu = work.share(tokens, targets, seconds, fabric.world_size) if work is not None else None
            memory = peak_memory(fabric.device)
            metrics.write(
                step=step,
                epoch=round(result.seen / len(train_rows), 4),
                loss=result.loss,
                lr=lr,
                tokens=result.tokens,
                seconds=round(result.seconds, 3),
                tokens_per_s=round(tokens / seconds, 1),
                mfu=None if mfu is None else round(mfu, 4),
                peak_memory=memory,
            )
            screen.step(plan.place(result), plan.share(result), result.loss, lr, tokens / seconds, mfu, memory)
            tokens_then, seconds_then, targets = result.tokens, result.seconds, 0
        if asked or (signals.code and fabric.world_size == 1) or paused():
            signals.code = signals.code or PAUSED
            stop()
        if train.save_interval and step % train.save_interval == 0 and not over():
            keep(f"step-{step:06d}")
    screen.stop()
    if evaluate.final_validation and len(val_rows):
        judge()
    return result


def peak_rate(optimizer: Optimizer, train: TrainArgs) -> float:
    """The learning rate after the warm-up."""
    return optimizer.param_groups[0]["lr"] if train.learning_rate is None else train.learning_rate


def memory_dry_run(fabric: "Fabric", model: Any, optimizer: Optimizer, batch: Batch) -> None:
    """Run the micro-batch of the longest rows forward and backward and forget it, so that a run that will not fit in
    memory fails at once. What dropout draws afterwards is as if it had not been."""
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices), fabric.no_backward_sync(model):
        fabric.backward(model(batch) / max(1, batch.n_target_tokens))
    optimizer.zero_grad()


def clip(fabric: "Fabric", model: Any, optimizer: Optimizer, max_norm: Optional[float]) -> torch.Tensor:
    """The norm of the gradient before it is clipped. Where gradients are scaled, infinite ones belong to it: 0."""
    if getattr(fabric.strategy.precision, "scaler", None) is not None:
        if max_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
        return torch.zeros(())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(grads)
    if max_norm is not None:
        share = (max_norm / (norm + 1e-6)).clamp(max=1)
        for grad in grads:
            local_shard(grad).mul_(share.to(grad.device))
    return norm


@torch.no_grad()
def validate(fabric: "Fabric", model: Any, batches: Iterator[Batch], signals: Signals) -> Optional[float]:
    """The mean loss of the trained tokens of `batches`, over all ranks; None if a signal came and there is one rank."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        sums += torch.tensor([float(model(batch)), batch.n_target_tokens], dtype=torch.float64)
        if signals.code and fabric.world_size == 1:
            break
    model.train()
    if signals.code and fabric.world_size == 1:
        return None
    total, count = summed(fabric, sums.to(fabric.device, torch.float32)).tolist()
    return total / count if count else math.nan


def summed(fabric: "Fabric", x: torch.Tensor) -> torch.Tensor:
    """`x` added up over all ranks."""
    total = fabric.all_reduce(x, reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total


def perplexity(loss: float) -> str:
    """`exp(loss)`, for people."""
    return f"{math.exp(loss):,.2f}" if loss < 50 else "inf"
