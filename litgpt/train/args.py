"""The groups of options that several commands share, and the settings of the run in progress."""

import math
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional, Union

from litgpt.errors import UserError, remark

# The words of the command line, and the settings as it parsed them. Unset when called from Python.
run_words: ContextVar[tuple[str, ...]] = ContextVar("run_words", default=())
run_settings: ContextVar[Optional[dict[str, Any]]] = ContextVar("run_settings", default=None)

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]


@dataclass
class TrainArgs:
    """How long, how much at a time, and how fast to learn.

    Args:
        save_interval: Optimizer steps between two checkpoints; null for none but the last.
        keep_last: Keep only so many of these checkpoints, the newest; null for all.
        save_best: Keep what had the lowest validation loss within the run, in best/.
        pause_after: Save and end after so many steps, with exit code 75, as if a queue had asked for it; --resume true
            goes on.
        log_interval: Optimizer steps between two lines of the log.
        global_batch_size: Rows that make one optimizer step, over all devices.
        gradient_accumulation_iters: Micro-batches of a device that make one optimizer step; instead of
            global_batch_size.
        micro_batch_size: Rows that go through the model at once, on one device.
        lr_warmup_steps: Optimizer steps in which the learning rate rises linearly to its full value. With max_tokens or
            max_time the warm-up takes at most a tenth of them.
        lr_warmup_fraction: The warm-up as a share of the run (its steps, tokens or time), instead of lr_warmup_steps.
        lr_schedule: The way from the full learning rate to min_lr: cosine, linear, or constant, which stays. With
            max_tokens or max_time it follows the share of them that is used.
        lr_decay_iters: Optimizer steps after which min_lr is reached; by default it is reached at the end of the run,
            whatever ends it.
        learning_rate: The full learning rate; by default the optimizer's lr, over which it wins.
        epochs: Times that the training rows are seen. The run ends with the first of this and the three limits below.
        max_tokens: Stop once this many tokens were read.
        max_steps: Stop after this many optimizer steps.
        max_time: Stop after this many seconds of training steps.
        max_seq_length: The longest row that is allowed, in tokens, at most what the model reads. By default what the
            model reads, for packs at most 2048.
        pack: Fill packs of max_seq_length tokens with rows that do not see each other; both batch sizes then count
            packs. By default true for text files and false for rows.
        tie_embeddings: Must agree with the checkpoint, which decides whether head and embedding share their weight.
        max_norm: Clip the norm of the gradient to this.
        min_lr: Where the schedule ends. 0 by default, so that the last steps settle.
        activation_checkpointing: Forget what happens within a block and compute it again in the backward pass: less
            memory for more time, with the same result.
    """

    save_interval: Optional[int] = 1000
    keep_last: Optional[int] = None
    save_best: bool = False
    pause_after: Optional[int] = None
    log_interval: int = 1
    global_batch_size: int = 16
    gradient_accumulation_iters: Optional[int] = None
    micro_batch_size: int = 1
    lr_warmup_steps: Optional[int] = 100
    lr_warmup_fraction: Optional[float] = None
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_decay_iters: Optional[int] = None
    learning_rate: Optional[float] = None
    epochs: Optional[int] = 5
    max_tokens: Optional[int] = None
    max_steps: Optional[int] = None
    max_time: Optional[float] = None
    max_seq_length: Optional[int] = None
    pack: Optional[bool] = None
    tie_embeddings: Optional[bool] = None
    max_norm: Optional[float] = None
    min_lr: float = 0.0
    activation_checkpointing: bool = False

    def check(self, world_size: int = 1) -> None:
        """Raise `UserError` for values that cannot be run on `world_size` devices; all that is wrong at once."""
        wrong = positive(
            "train",
            save_interval=self.save_interval,
            keep_last=self.keep_last,
            pause_after=self.pause_after,
            log_interval=self.log_interval,
            global_batch_size=self.global_batch_size,
            gradient_accumulation_iters=self.gradient_accumulation_iters,
            micro_batch_size=self.micro_batch_size,
            lr_decay_iters=self.lr_decay_iters,
            epochs=self.epochs,
            max_tokens=self.max_tokens,
            max_steps=self.max_steps,
            max_time=self.max_time,
            max_seq_length=self.max_seq_length,
            max_norm=self.max_norm,
        )
        at_once = self.micro_batch_size * world_size
        if not wrong and self.gradient_accumulation_iters is None and self.global_batch_size % at_once:
            devices = f" on {world_size} devices" if world_size > 1 else ""
            lower = max(1, self.global_batch_size // at_once) * at_once
            wrong.append(
                f"--train.global_batch_size {self.global_batch_size} is no multiple of --train.micro_batch_size "
                f"{self.micro_batch_size}{devices}; {lower} or {lower + at_once} would do"
            )
        if self.lr_warmup_steps is not None and self.lr_warmup_steps < 0:
            wrong.append(f"--train.lr_warmup_steps {self.lr_warmup_steps} is below 0")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction <= 1:
            wrong.append(f"--train.lr_warmup_fraction {self.lr_warmup_fraction} is not between 0 and 1")
        if self.lr_warmup_fraction is not None and self.lr_warmup_steps not in (None, TrainArgs.lr_warmup_steps):
            wrong.append(
                f"--train.lr_warmup_fraction {self.lr_warmup_fraction} and --train.lr_warmup_steps "
                f"{self.lr_warmup_steps} exclude each other: give one of them"
            )
        if self.learning_rate is not None and not self.learning_rate >= 0:
            wrong.append(f"--train.learning_rate {self.learning_rate} is below 0")
        if self.min_lr < 0:
            wrong.append(f"--train.min_lr {self.min_lr} is below 0")
        if self.epochs is None and not (self.max_steps or self.max_tokens or self.max_time):
            wrong.append(
                "nothing ends the run: give --train.epochs, --train.max_steps, --train.max_tokens or --train.max_time"
            )
        if wrong:
            raise UserError("; ".join(wrong) + ".")

    def on(self, world_size: int) -> "TrainArgs":
        """The same with both batch sizes as they are on so many devices. Raises `UserError` if that cannot be.

        A recipe for one device may have micro-batches that are more than the share of each of several; they become
        smaller, which does not change the result.
        """
        share, rest = divmod(self.global_batch_size, world_size)
        if world_size > 1 and self.gradient_accumulation_iters is None and not rest and share % self.micro_batch_size:
            size = math.gcd(share, self.micro_batch_size)
            rows = f"each of {world_size} devices has {share} rows of a step"
            remark(f"--train.micro_batch_size {self.micro_batch_size} is {size} here: {rows}, as many as before.")
            return replace(self, micro_batch_size=size)
        self.check(world_size)
        if self.gradient_accumulation_iters is None:
            return self
        size = self.micro_batch_size * self.gradient_accumulation_iters * world_size
        return replace(self, global_batch_size=size)


@dataclass
class EvalArgs:
    """When and how the model is judged on rows that it does not train on.

    Args:
        interval: Optimizer steps between two validations.
        max_new_tokens: Length of the answer in the example; null for no example.
        max_iters: Micro-batches that a validation within the run reads, the first so many; null for all.
        initial_validation: Validate on all rows before the first step. On by default, so that the end of the run can
            say what it changed.
        final_validation: Validate on all rows after the last step.
        early_stopping_patience: End the run after so many validations within it, one after the other, whose loss is no
            new best.
        evaluate_example: The validation row whose prompt is answered before and after: first, random, or its number.
        examples: How many rows are answered so, from that one on.
        exact_match: Answer so many validation prompts before and after, and count the answers that are exactly the
            row's; for short answers.
    """

    interval: int = 100
    max_new_tokens: Optional[int] = 100
    max_iters: Optional[int] = 100
    initial_validation: bool = True
    final_validation: bool = True
    early_stopping_patience: Optional[int] = None
    evaluate_example: Union[Literal["first", "random"], int] = "first"
    examples: int = 1
    exact_match: Optional[int] = None

    def check(self) -> None:
        """Raise `UserError` for values that cannot be run; all that is wrong at once."""
        wrong = positive(
            "eval",
            interval=self.interval,
            max_new_tokens=self.max_new_tokens,
            max_iters=self.max_iters,
            exact_match=self.exact_match,
            early_stopping_patience=self.early_stopping_patience,
        )
        if isinstance(self.evaluate_example, int) and self.evaluate_example < 0:
            wrong.append(f"--eval.evaluate_example {self.evaluate_example} is below 0")
        if self.exact_match is not None and self.max_new_tokens is None:
            wrong.append(f"--eval.exact_match {self.exact_match} needs answers: give --eval.max_new_tokens")
        if wrong:
            raise UserError("; ".join(wrong) + ".")


@dataclass
class LogArgs:
    """What a run is called in the logger; for wandb and mlflow. What has no effect is said.

    Args:
        project: The project (wandb) or experiment (mlflow); by default litgpt.
        run: The name of the run; by default its out_dir.
        group: A name that several runs share.
        teamspace: Without effect: of a platform that is not supported, like the following.
        metadata: Without effect.
        log_model: Without effect.
        save_logs: Without effect.
        checkpoint_name: Without effect.
    """

    project: Optional[str] = None
    run: Optional[str] = None
    group: Optional[str] = None
    teamspace: Optional[str] = None
    metadata: Optional[dict[str, str]] = None
    log_model: bool = False
    save_logs: bool = True
    checkpoint_name: Optional[str] = None


def positive(group: str, **values: Optional[float]) -> list[str]:
    """What is wrong with those of `values` that are given and not above 0."""
    return [f"--{group}.{name} {v} must be above 0" for name, v in values.items() if v is not None and v <= 0]
