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

from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.batches import Batch, Rows, micro_batches, steps_of_rows
from litgpt.shards import mine, total_norm
from litgpt.train.faults import sound
from litgpt.train.launch import peak_memory
from litgpt.train.metrics import Metrics
from litgpt.train.progress import Screen
from litgpt.train.schedule import learning_rate
from litgpt.train.signals import Signals, Stopped
from litgpt.train.speed import Work

if TYPE_CHECKING:
    from lightning.fabric import Fabric


PAUSED = 75  # the exit code of a run that --train.pause_after ended, as for SIGUSR1


@dataclass
class Plan:
    """What a run will do, step by step.

    Args:
        steps: Optimizer steps.
        warmup: How many of them warm up.
        decay: The step at which the learning rate is at its least.
        cut_warmup: The warm-up that was asked for, if it was longer than that and had to be cut.
    """

    steps: int
    warmup: int
    decay: int
    cut_warmup: Optional[int] = None

    @classmethod
    def make(cls, train: TrainArgs, rows: Rows) -> "Plan":
        limits = [train.max_steps or math.inf]
        if train.epochs is not None:
            limits.append(math.ceil(len(rows) * train.epochs / train.global_batch_size))
        if train.max_tokens is not None:
            mean = float(rows.lengths.float().mean())
            limits.append(math.ceil(train.max_tokens / (mean * train.global_batch_size)))
        steps = int(min(limits)) if min(limits) < math.inf else 10**9  # max_time alone ends the run
        wanted = train.lr_warmup_steps or 0
        if train.lr_warmup_fraction is not None:
            wanted = round(train.lr_warmup_fraction * steps)
        decay = train.lr_decay_iters or steps
        end = min(steps, decay)
        return cls(steps, wanted, decay) if wanted <= end else cls(steps, end // 10, decay, cut_warmup=wanted)


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
    work: Optional[Work],
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
        screen.say(f"step {result.steps}/{plan.steps} | validation loss {loss:.4f} | perplexity {perplexity(loss)}")
        return loss

    def over() -> bool:
        """Validate if that is due; whether the run ends here."""
        if result.early or result.steps >= plan.steps or out_of_budget(fabric, train, result):
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
    rehearse(fabric, model, optimizer, longest.to(fabric.device))
    if evaluate.initial_validation and len(val_rows) and not result.steps:
        judge()
    screen.start(plan.steps, result.steps)
    tokens_then, seconds_then, targets = result.tokens, result.seconds, 0
    order = steps_of_rows(len(train_rows), train.global_batch_size, train.epochs, seed)
    coming = ((rows, list(batches(rows, train_rows))) for rows in itertools.islice(order, result.steps, plan.steps))
    following = next(coming, None)
    while following is not None:
        if result.steps and over():
            break
        rows, parts = following
        step, began = result.steps + 1, time.perf_counter()
        lr = learning_rate(step - 1, plan.decay, plan.warmup, peak, train.min_lr, train.lr_schedule)
        # ------------------------------------------------------------------------------------------------ the step
        counts = torch.tensor([sum(b.n_trained for b in parts), signals.code], device=fabric.device)
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
        if not sound(result.loss, norm):
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
        targets += trained
        if step % train.log_interval == 0 or step == plan.steps:
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
            screen.step(step, result.loss, lr, tokens / seconds, mfu, memory)
            tokens_then, seconds_then, targets = result.tokens, result.seconds, 0
        if asked or (signals.code and fabric.world_size == 1) or paused():
            signals.code = signals.code or PAUSED
            stop()
        if step < plan.steps and train.save_interval and step % train.save_interval == 0 and not over():
            keep(f"step-{step:06d}")
    screen.stop()
    if evaluate.final_validation and len(val_rows):
        judge()
    return result


def peak_rate(optimizer: Optimizer, train: TrainArgs) -> float:
    """The learning rate after the warm-up."""
    return optimizer.param_groups[0]["lr"] if train.learning_rate is None else train.learning_rate


def out_of_budget(fabric: "Fabric", train: TrainArgs, result: Result) -> bool:
    """Whether `max_tokens` or `max_time` ends the run here; rank 0's clock decides for all."""
    late = train.max_time is not None and result.seconds >= train.max_time
    if train.max_time is not None:
        late = bool(fabric.broadcast(late))
    return late or (train.max_tokens is not None and result.tokens >= train.max_tokens)


def rehearse(fabric: "Fabric", model: Any, optimizer: Optimizer, batch: Batch) -> None:
    """Run the micro-batch of the longest rows forward and backward and forget it, so that a run that will not fit in
    memory fails at once. What dropout draws afterwards is as if it had not been."""
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices), fabric.no_backward_sync(model):
        fabric.backward(model(batch) / max(1, batch.n_trained))
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
            mine(grad).mul_(share.to(grad.device))
    return norm


@torch.no_grad()
def validate(fabric: "Fabric", model: Any, batches: Iterator[Batch], signals: Signals) -> Optional[float]:
    """The mean loss of the trained tokens of `batches`, over all ranks; None if a signal came and there is one rank."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        sums += torch.tensor([float(model(batch)), batch.n_trained], dtype=torch.float64)
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
