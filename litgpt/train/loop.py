"""The one training loop.

The loss of a step is the sum over its trained tokens divided by their number, over all micro-batches and all ranks.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch.optim import Optimizer

from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.batches import Batch, Rows, micro_batches, steps_of_rows
from litgpt.errors import UserError
from litgpt.train.launch import peak_memory
from litgpt.train.metrics import Metrics
from litgpt.train.progress import Screen
from litgpt.train.schedule import learning_rate

if TYPE_CHECKING:
    from lightning.fabric import Fabric


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
    """What a run did. Losses are in nats per trained token, `tokens` are those read, `seconds` those of training."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    val_losses: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)


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
    save: Callable[[int], None],
) -> Result:
    """Train.

    Args:
        model: A `LossModel`, set up by `fabric`, like the optimizer.
        save: Called with the step's number every `train.save_interval` steps.
    """
    result = Result()
    size, ranks = train.micro_batch_size, (fabric.global_rank, fabric.world_size)
    peak = peak_rate(optimizer, train)

    def batches(rows: list[int], source: Rows) -> Iterator[Batch]:
        return (source.batch(part).to(fabric.device) for part in micro_batches(rows, size, *ranks))

    def judge(step: int, max_iters: Optional[int] = None) -> float:
        loss = validate(fabric, model, itertools.islice(batches(list(range(len(val_rows))), val_rows), max_iters))
        result.val_losses.append((step, loss))
        metrics.write(step=step, val_loss=loss, tokens=result.tokens, seconds=round(result.seconds, 3))
        screen.say(f"step {step}/{plan.steps} | validation loss {loss:.4f} | perplexity {perplexity(loss)}")
        return loss

    rehearse(fabric, model, optimizer, train_rows.batch(train_rows.longest(size)).to(fabric.device))
    if evaluate.initial_validation and len(val_rows):
        judge(0)
    screen.start(plan.steps)
    seen, tokens_then, seconds_then = 0, 0, 0.0
    best, since_best = math.inf, 0  # of the validations within the run, which may read fewer rows than the others
    order = steps_of_rows(len(train_rows), train.global_batch_size, train.epochs, seed)
    for step, rows in enumerate(itertools.islice(order, plan.steps), start=1):
        began = time.perf_counter()
        lr = learning_rate(step - 1, plan.decay, plan.warmup, peak, train.min_lr, train.lr_schedule)
        # ------------------------------------------------------------------------------------------------ the step
        parts = list(batches(rows, train_rows))
        count = torch.tensor(sum(b.n_trained for b in parts), device=fabric.device)
        trained = int(summed(fabric, count))
        loss = torch.zeros((), device=fabric.device)
        for i, batch in enumerate(parts):
            with fabric.no_backward_sync(model, enabled=i + 1 < len(parts)):
                part = model(batch) / trained
                fabric.backward(part * fabric.world_size)  # gradients are averaged over ranks
            loss += part.detach()
        if train.max_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=train.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()
        # --------------------------------------------------------------------------------------------------------
        result.steps = step
        seen += len(rows)
        result.tokens += int(train_rows.lengths[rows].sum())
        log = step % train.log_interval == 0 or step == plan.steps
        if log:
            result.loss = float(summed(fabric, loss))
            if not math.isfinite(result.loss):
                raise UserError(
                    f"The loss of step {step} is {result.loss}: nothing more is learned. A lower --optimizer.lr or "
                    "--train.max_norm 1 may help; litgpt validate says whether the weights are sound."
                )
        result.seconds += time.perf_counter() - began
        if log:
            speed = (result.tokens - tokens_then) / (result.seconds - seconds_then)
            memory = peak_memory(fabric.device)
            metrics.write(
                step=step,
                epoch=round(seen / len(train_rows), 4),
                loss=result.loss,
                lr=lr,
                tokens=result.tokens,
                seconds=round(result.seconds, 3),
                tokens_per_s=round(speed, 1),
                peak_memory=memory,
            )
            screen.step(step, result.loss, lr, speed, memory)
            tokens_then, seconds_then = result.tokens, result.seconds
        over = out_of_budget(fabric, train, result)
        if step < plan.steps and not over:
            if len(val_rows) and step % evaluate.interval == 0:
                loss_now = judge(step, evaluate.max_iters)
                best, since_best = (loss_now, 0) if loss_now < best else (best, since_best + 1)
                if since_best == evaluate.early_stopping_patience:
                    screen.say(f"The run stops here: {since_best} validations without a loss below {best:.4f}.")
                    over = True
            if not over and train.save_interval and step % train.save_interval == 0:
                save(step)
        if over:
            break
    screen.stop()
    if evaluate.final_validation and len(val_rows):
        judge(result.steps)
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


@torch.no_grad()
def validate(fabric: "Fabric", model: Any, batches: Iterator[Batch]) -> float:
    """The mean loss of the trained tokens of `batches`, over all ranks."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        sums += torch.tensor([float(model(batch)), batch.n_trained], dtype=torch.float64)
    model.train()
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
