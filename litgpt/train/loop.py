"""The training loop.

The loss of a step is the sum over its target tokens divided by their number, over all micro-batches and all ranks.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Optional

import torch
from torch.optim import Optimizer

from litgpt.data.batches import Batch, Rows, micro_batches, steps_of_rows
from litgpt.model.devices import peak_memory, to_device
from litgpt.model.sharded import local_shard, total_norm
from litgpt.train.args import AUTO, IntOrAuto, halt_at
from litgpt.train.control import Control
from litgpt.train.faults import all_finite, crash
from litgpt.train.progress import Step, gigabytes, percent
from litgpt.train.signals import Stopped

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from litgpt.train.run import Run

PAUSED = 75  # exit code after --train.pause_after, as for SIGUSR1
RECENT = 20  # steps over which the screen averages the speed


class Trainer:
    """Trains the model of a run until its plan is done, it stops improving, or a signal ends the run."""

    def __init__(self, run: "Run") -> None:
        self.run, self.fabric, self.screen = run, run.fabric, run.screen
        self.model, self.optimizer = run.fabric_model, run.fabric_optimizer
        self.train, self.eval, self.plan, self.result = run.train, run.eval, run.plan, run.result
        self.train_rows, self.val_rows = run.train_rows, run.val_rows
        self.metrics, self.signals, self.objective = run.metrics, run.signals, run.method.objective
        self.first_step = self.result.steps
        self.saved_steps, self.saved_seconds = self.result.steps, self.result.seconds
        self.start_log_window()
        self.recent = deque([(self.result.tokens, self.result.seconds)], maxlen=RECENT)
        size, seen = self.train.global_batch_size, self.result.seen
        steps = steps_of_rows(len(self.train_rows), size, self.train.epochs, run.seed, seen)
        left = None if self.plan.steps is None else max(0, self.plan.steps - self.result.steps)
        self.steps = itertools.islice(steps, left)
        self.control = Control(self)

    def fit(self) -> None:
        """Train. Raises `UserError` if a loss or a gradient is not finite, and `Stopped` if a signal or
        --train.pause_after ended the run; then the last complete step is saved."""
        fabric, model, optimizer, result = self.fabric, self.model, self.optimizer, self.result
        self.signals.holds = True
        self.prepare()
        upcoming = self.next_step()
        while upcoming is not None and not (result.steps and self.should_stop()):
            rows, batches = upcoming
            began = time.perf_counter()
            lr = self.next_rate()
            # ------------------------------------------------------------------------------------------------ the step
            numbers = [self.signals.code, self.is_time_to_save(), self.control.n_due(result.steps + 1)]
            numbers.append(sum(b.n_target_tokens for b in batches))
            counts = torch.tensor([*numbers, *self.objective.counts(batches)])
            counts, units = sum_over_ranks(fabric, to_device(fabric.device, counts)[0]).tensor_split([len(numbers)])
            self.objective.begin_step(self.run, rows)
            loss = torch.zeros(1, device=fabric.device)
            for i, batch in enumerate(batches):
                self.run.last_batch = batch
                with fabric.no_backward_sync(model, enabled=i + 1 < len(batches)):
                    part = (model(batch) / units).sum()
                    fabric.backward(part * fabric.world_size)  # gradients are averaged over ranks
                loss += part.detach()
            upcoming = self.next_step()  # while the device is busy
            norm_on_device = clip(fabric, model, optimizer, self.train.max_norm)
            sums = sum_over_ranks(fabric, torch.cat([loss, self.objective.take_sums(fabric.device)]))
            signaled, save, n_due, n_targets, norm, result.loss, *measured = read(*counts, norm_on_device, *sums)
            if not all_finite(result.loss, norm):
                raise crash(self.run, result.steps + 1, rows, result.loss, norm)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            optimizer.step()
            optimizer.zero_grad()
            # --------------------------------------------------------------------------------------------------------
            self.count_step(rows, began)
            self.log_step(lr, int(n_targets), self.objective.values(measured))
            if n_due:
                self.control.follow(quickly=bool(signaled))
            if signaled or self.is_interrupted or self.should_pause():
                self.signals.code = self.signals.code or PAUSED
                self.stop()
            if (save or self.is_due(self.train.save_interval)) and not self.should_stop():
                self.save_step()
        self.screen.stop()
        if self.run.is_frozen and result.steps > self.saved_steps:
            self.save_step()
        if self.eval.final_validation and len(self.val_rows):
            self.validate()

    def prepare(self) -> None:
        """Validate before the first step; or, if the run resumes, do what it had not done after the last one."""
        if self.result.steps:
            self.control.follow()
        if self.eval.initial_validation and len(self.val_rows) and not self.result.steps:
            self.validate()
        self.screen.start(self.plan.fraction_done(self.result), self.plan.position(self.result))

    def next_rate(self) -> float:
        """The learning rate of the next step."""
        train = self.train
        return self.plan.learning_rate(self.result, self.run.peak_lr, train.min_lr, train.lr_schedule)

    def next_step(self) -> Optional[tuple[list[int], list[Batch]]]:
        """The rows of the next step over all ranks, and the micro-batches of this rank; None at the end."""
        rows = next(self.steps, None)
        return None if rows is None else (rows, list(self.micro_batches(rows, self.train_rows)))

    def micro_batches(self, rows: list[int], source: Rows) -> Iterator[Batch]:
        fabric = self.fabric
        parts = micro_batches(rows, self.train.micro_rows, fabric.global_rank, fabric.world_size)
        return (source.batch(part).to(fabric.device) for part in parts)

    @torch.no_grad()
    def validate(self, n_rows: Optional[int] = None) -> float:
        """Measure the validation loss on the first `n_rows` rows, by default on all."""
        fabric, model, result = self.fabric, self.model, self.result
        rows = list(range(len(self.val_rows)))[:n_rows]
        objective, parts = self.objective, torch.zeros(len(self.objective.counts([])), dtype=torch.float64)
        counts = torch.zeros_like(parts)
        model.eval()
        objective.begin_validation(self.run, rows)
        for batch in self.micro_batches(rows, self.val_rows):
            self.run.last_batch = batch
            parts += torch.tensor(model(batch).view(-1).tolist(), dtype=torch.float64)
            counts += torch.tensor(objective.counts([batch]), dtype=torch.float64)
            if self.is_interrupted:
                self.stop()
        model.train()
        own = torch.cat([parts, counts]).to(fabric.device, torch.float32)
        sums = sum_over_ranks(fabric, torch.cat([own, objective.take_sums(fabric.device)])).tolist()
        n, found = len(parts), objective.values(sums[2 * len(parts) :])
        loss = sum(part / count if count else math.nan for part, count in zip(sums[:n], sums[n : 2 * n]))
        result.val_losses.append((result.steps, loss))
        result.val_metrics.append(found)
        self.metrics.write(
            step=result.steps,
            val_loss=loss,
            tokens=result.tokens,
            seconds=round(result.seconds, 3),
            **{f"val_{name}": value for name, value in found.items()},
        )
        remark = objective.describe(found) or f"perplexity {perplexity(loss)}"
        self.screen.say(f"{self.plan.position(result)} | validation loss {loss:.4f} | {remark}")
        return loss

    def should_stop(self) -> bool:
        """Whether the run ends here. Validates first if that is due."""
        result = self.result
        if result.early or self.plan.is_done(result):
            return True
        if self.is_validation_due and result.last_eval_step != result.steps:
            self.evaluate()
        return result.early

    @property
    def is_validation_due(self) -> bool:
        return len(self.val_rows) > 0 and self.plan.is_validation_due(self.eval.interval, self.result)

    def evaluate(self, on_done: Callable[[], None] = lambda: None) -> float:
        """Validate during training, save the best model, and see whether to stop early; for that, only validations that
        are due count. `on_done` is called before a model is saved."""
        result, patience, is_due = self.result, self.eval.early_stopping_patience, self.is_validation_due
        loss = self.validate(self.run.n_eval_rows)
        result.last_eval_step = result.steps
        on_done()
        if is_best := loss < result.best:
            result.best, result.since_best = loss, 0
        else:
            result.since_best += is_due
        if self.train.save_best and is_best:
            self.save_checkpoint("best")
        if is_due and result.since_best == patience:
            self.screen.say(f"Stopping early: no loss below {result.best:.4f} in the last {patience} validations.")
            result.early = True
        return loss

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal came. Several ranks have to agree on that, which they do once per step."""
        return bool(self.signals.code) and self.fabric.world_size == 1

    def is_due(self, interval: Optional[IntOrAuto]) -> bool:
        return isinstance(interval, int) and self.result.steps % interval == 0

    def is_time_to_save(self) -> bool:
        """Whether a checkpoint is due after this step if the run picks the time, by the clock of the first rank."""
        if self.train.save_interval != AUTO or not self.fabric.is_global_zero:
            return False
        steps, seconds = self.result.steps + 1 - self.saved_steps, self.result.seconds - self.saved_seconds
        return self.plan.is_checkpoint_due(self.result, steps, seconds)

    def should_pause(self) -> bool:
        pause_after, fraction = self.train.pause_after, halt_at.get()
        if fraction is not None and self.plan.fraction_done(self.result) >= fraction:
            return True
        return pause_after is not None and self.result.steps - self.first_step >= pause_after

    def save_checkpoint(self, name: str) -> None:
        self.metrics.flush()
        self.run.saver.checkpoint(name)
        self.saved_steps, self.saved_seconds = self.result.steps, self.result.seconds

    def save_step(self) -> Path:
        """Save a checkpoint of the last step."""
        self.save_checkpoint(name := f"step-{self.result.steps:06d}")
        return self.run.out_dir / name

    def stop(self) -> NoReturn:
        self.screen.stop()
        if self.result.steps:
            self.save_step()
        raise Stopped(self.signals.code if self.fabric.is_global_zero else 0)  # a failed rank would kill the others

    def count_step(self, rows: list[int], began: float) -> None:
        """Add a step, which began at this time, to the result."""
        result = self.result
        result.steps += 1
        result.seen += len(rows)
        result.tokens += int(self.train_rows.lengths[rows].sum())
        result.seconds += time.perf_counter() - began
        if self.plan.seconds is not None:  # the first rank's clock decides for all
            result.seconds = self.fabric.broadcast(result.seconds)

    def start_log_window(self) -> None:
        self.logged_tokens, self.logged_seconds, self.window_targets = self.result.tokens, self.result.seconds, 0

    def log_step(self, lr: float, n_targets: int, measured: dict[str, float]) -> None:
        """Show the step, and write the metrics since the last ones if that is due."""
        result, loss = self.result, self.result.loss
        self.window_targets += n_targets
        if self.is_due(self.train.log_interval) or self.plan.is_done(result):
            self.write_metrics(lr, measured)
        speed = self.recent_speed()

        def details() -> list[str]:
            name = "GEMM utilization" if self.run.flops is None else self.run.flops.name
            memory = gigabytes(peak_memory(self.fabric.device))
            return [f"lr {lr:.2e}", f"{speed:,.0f} tokens/s", memory, f"{name} {percent(self.run.utilization)}"]

        val_loss = result.val_losses[-1][1] if result.val_losses else None
        done, position = self.plan.fraction_done(result), self.plan.position(result)
        self.screen.step(Step(done, position, loss, val_loss, details))

    def recent_speed(self) -> float:
        """Tokens per second in the last steps."""
        tokens, seconds = self.recent[0]
        self.recent.append((self.result.tokens, self.result.seconds))
        return (self.result.tokens - tokens) / max(self.result.seconds - seconds, 1e-9)

    def write_metrics(self, lr: float, measured: dict[str, float]) -> None:
        """Write a line of metrics about the last step, and the speed since the line before it."""
        result = self.result
        tokens, seconds = result.tokens - self.logged_tokens, result.seconds - self.logged_seconds
        if self.run.flops is not None:
            self.run.utilization = self.run.flops.share(tokens, self.window_targets, seconds, self.fabric.world_size)
        self.metrics.write(
            step=result.steps,
            epoch=round(result.seen / len(self.train_rows), 4),
            loss=result.loss,
            lr=lr,
            tokens=result.tokens,
            seconds=round(result.seconds, 3),
            tokens_per_s=round(tokens / seconds, 1),
            mfu=None if self.run.utilization is None else round(self.run.utilization, 4),
            peak_memory=peak_memory(self.fabric.device),
            **measured,
        )
        self.start_log_window()


def clip(fabric: "Fabric", model: Any, optimizer: Optimizer, max_norm: Optional[float]) -> torch.Tensor:
    """Clip the gradient and return its norm before that; 0 with a gradient scaler, where infinite ones are normal."""
    if getattr(fabric.strategy.precision, "scaler", None) is not None:
        if max_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
        return torch.zeros((), device=fabric.device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(grads)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        for grad in grads:
            local_shard(grad).mul_(scale.to(grad.device))
    return norm


def read(*scalars: torch.Tensor) -> list[float]:
    """The values of scalars on the device, by the one transfer of a step that the host waits for. In float32, which is
    exact for whole numbers up to 2^24."""
    return torch.stack([x.to(scalars[0].device, torch.float32) for x in scalars]).tolist()


def sum_over_ranks(fabric: "Fabric", x: torch.Tensor) -> torch.Tensor:
    total = fabric.all_reduce(x, reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 50 else "inf"
