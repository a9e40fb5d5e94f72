"""Option groups that several commands share, and the settings of the run in progress."""

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

from litgpt.errors import UserError, remark

# The words of the command line, the names of the options among them, and the settings as it parsed them. Unset when
# called from Python.
run_words: ContextVar[tuple[str, ...]] = ContextVar("run_words", default=())
run_command: ContextVar[Optional[str]] = ContextVar("run_command", default=None)  # its name in the table of commands
run_flags: ContextVar[frozenset[str]] = ContextVar("run_flags", default=frozenset())
run_settings: ContextVar[Optional[dict[str, Any]]] = ContextVar("run_settings", default=None)


@dataclass
class PlanArgs:
    """What a plan is for.

    Args:
        gpu: The memory of the GPU, such as "24 GB", or the name of a GPU; by default the device of this machine.
        price: Price of an hour of all devices.
        utilization: Share of the GPU's peak that training reaches, such as 0.4, for the time.
        tokens: The length of rows, to plan without data.
        measure: Whether to run two steps and compare.
        apply: YAML file to write the cheapest settings that fit to.
    """

    gpu: Optional[str] = None
    price: Optional[float] = None
    utilization: Optional[float] = None
    tokens: Optional[int] = None
    measure: bool = False
    apply: Optional[Path] = None


planning: ContextVar[Optional[PlanArgs]] = ContextVar("planning", default=None)  # set while a run is only planned

# the fraction of its steps at which a run pauses, as --train.pause_after does; set by a sweep
halt_at: ContextVar[Optional[float]] = ContextVar("halt_at", default=None)

# the steps and texts of the events that a run repeats; set by a rerun
repeated: ContextVar[Sequence[tuple[int, str]]] = ContextVar("repeated", default=())

AUTO: Literal["auto"] = "auto"
IntOrAuto = Union[Literal["auto"], int]
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"]


@dataclass
class TrainArgs:
    """Training options.

    Args:
        save_interval: Optimizer steps between checkpoints; null saves only the result. auto saves about every tenth of
            the run and at least every 10 minutes, but at most once a minute.
        keep_last: Keep only this many of the newest checkpoints; null keeps all of them. auto keeps one if
            save_interval is auto, and all otherwise.
        save_best: Also save the checkpoint with the lowest validation loss, in best/.
        pause_after: Save a checkpoint and exit with code 75 after this many steps. Continue with --resume true.
        log_interval: Optimizer steps between lines of metrics.csv and of the logger. The screen does not depend on it.
        global_batch_size: Rows per optimizer step, over all devices.
        gradient_accumulation_iters: Micro-batches per optimizer step on each device, instead of global_batch_size.
        micro_batch_size: Rows per forward pass on each device. The result does not depend on it. auto is the largest
            divisor of a device's share of global_batch_size that fits in memory, on a CPU at most 8.
        lr_warmup_steps: Optimizer steps over which the learning rate rises linearly to its peak. auto is a tenth of the
            run, at most 100 steps (2,000 for pretraining). With max_tokens or max_time, the warmup takes at most a
            tenth of the run.
        lr_warmup_fraction: Warmup as a fraction of the run (steps, tokens, or time), instead of lr_warmup_steps.
        lr_schedule: How the learning rate decays from its peak to min_lr. constant does not decay. With max_tokens or
            max_time, the schedule follows the fraction of that budget used.
        lr_decay_iters: Optimizer step at which the learning rate reaches min_lr; by default the end of the run.
        learning_rate: Peak learning rate. Overrides the optimizer's lr. If a finetune has neither, optimizers of Adam's
            type get a rate that depends on the method and the width of the model (LitGPT: 1e-3).
        epochs: Passes over the training rows. The run ends at the first limit reached: epochs, max_tokens, max_steps,
            or max_time.
        max_tokens: Stop after reading this many tokens.
        max_steps: Stop after this many optimizer steps.
        max_time: Stop after this many seconds of training, not counting validation.
        max_seq_length: Maximum row length in tokens; by default the model's context length, or at most 2048 when
            packing.
        pack: Pack rows into sequences of max_seq_length tokens. Rows in a pack do not attend to each other. Batch sizes
            then count packs. By default true for text files and false otherwise.
        tie_embeddings: Whether the head shares the embedding's weight. Must match the checkpoint if there is one.
        max_norm: Maximum gradient norm; larger gradients are clipped.
        min_lr: Learning rate at the end of the schedule.
        activation_checkpointing: Recompute the activations of each block in the backward pass. Saves memory, takes more
            time, and gives the same result. offload also moves the inputs of the blocks to CPU memory; block is the
            same as true.
    """

    save_interval: Optional[IntOrAuto] = AUTO
    keep_last: Optional[IntOrAuto] = AUTO
    save_best: bool = False
    pause_after: Optional[int] = None
    log_interval: int = 1
    global_batch_size: int = 16
    gradient_accumulation_iters: Optional[int] = None
    micro_batch_size: IntOrAuto = AUTO
    lr_warmup_steps: Optional[IntOrAuto] = AUTO
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
    activation_checkpointing: Union[bool, Literal["block", "offload"]] = False

    def check(self, world_size: int = 1) -> None:
        """Raise `UserError` for values that cannot run on `world_size` devices, all of them at once."""
        positive = """save_interval keep_last pause_after log_interval global_batch_size gradient_accumulation_iters
            micro_batch_size lr_decay_iters epochs max_tokens max_steps max_time max_seq_length max_norm"""
        wrong = not_positive("train", self, positive.split())
        rows_at_once = self.micro_rows * world_size
        if not wrong and self.gradient_accumulation_iters is None and self.global_batch_size % rows_at_once:
            devices = f" on {world_size} devices" if world_size > 1 else ""
            unit = f"--train.micro_batch_size {self.micro_rows}{devices}"
            unit = f"the number of devices, {world_size}" if self.micro_batch_size == AUTO else unit
            lower = max(1, self.global_batch_size // rows_at_once) * rows_at_once
            wrong.append(
                f"--train.global_batch_size {self.global_batch_size} is not a multiple of {unit}; use {lower} or "
                f"{lower + rows_at_once}"
            )
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction <= 1:
            wrong.append(f"--train.lr_warmup_fraction {self.lr_warmup_fraction} is not between 0 and 1")
        if self.lr_warmup_fraction is not None and self.lr_warmup_steps not in (None, AUTO):
            wrong.append(
                f"--train.lr_warmup_fraction {self.lr_warmup_fraction} and --train.lr_warmup_steps "
                f"{self.lr_warmup_steps} exclude each other; set only one of them"
            )
        for name in ("lr_warmup_steps", "learning_rate", "min_lr"):
            if (value := getattr(self, name)) not in (None, AUTO) and not value >= 0:
                wrong.append(f"--train.{name} {value} is below 0")
        if self.epochs is None and not (self.max_steps or self.max_tokens or self.max_time):
            limits = "--train.epochs, --train.max_steps, --train.max_tokens, or --train.max_time"
            wrong.append(f"nothing ends the run; set {limits}")
        if wrong:
            raise UserError("; ".join(wrong) + ".")

    def unused(self) -> list[str]:
        """A note about options that a constant learning rate does not use."""
        unused = [f"--train.{name}" for name in ("lr_decay_iters", "min_lr") if getattr(self, name)]
        if self.lr_schedule != "constant" or not unused:
            return []
        return [f"Ignored with --train.lr_schedule constant: {', '.join(unused)}."]

    @property
    def micro_rows(self) -> int:
        """Rows per micro-batch, 1 for auto. With gradient_accumulation_iters it stays 1, since the number of rows in a
        step must not depend on the memory."""
        return 1 if self.micro_batch_size == AUTO else self.micro_batch_size

    @property
    def kept_checkpoints(self) -> Optional[int]:
        if self.keep_last == AUTO:
            return 1 if self.save_interval == AUTO else None
        return self.keep_last

    def micro_batch_sizes(self, world_size: int, largest: Optional[int]) -> list[int]:
        """The sizes that auto tries, up to `largest`, beginning with the largest; else the size."""
        if self.micro_batch_size != AUTO or self.gradient_accumulation_iters is not None:
            return [self.micro_rows]
        share = self.global_batch_size // world_size
        return [n for n in range(min(share, largest or share), 0, -1) if share % n == 0]

    def on(self, world_size: int) -> "TrainArgs":
        """The same options with the batch sizes that `world_size` devices use: smaller micro-batches if a device's
        share of a step is not a multiple of theirs, which does not change the result. Raises `UserError` if the rows of
        a step cannot be divided among the devices."""
        share, rest = divmod(self.global_batch_size, world_size)
        if world_size > 1 and self.gradient_accumulation_iters is None and not rest and share % self.micro_rows:
            size = math.gcd(share, self.micro_rows)
            remark(
                f"Using --train.micro_batch_size {size} instead of {self.micro_batch_size}: each of the {world_size} "
                f"devices processes {share} rows per step. The result does not change."
            )
            return replace(self, micro_batch_size=size)
        self.check(world_size)
        if self.gradient_accumulation_iters is None:
            return self
        size = self.micro_rows * self.gradient_accumulation_iters * world_size
        return replace(self, global_batch_size=size)


@dataclass
class EvalArgs:
    """Validation options.

    Args:
        interval: Optimizer steps between validations. auto is about a tenth of the run.
        max_new_tokens: Maximum length of the example answers; null shows no examples.
        max_iters: Micro-batches per validation during training, on each device; rows, if micro_batch_size is auto. null
            validates on all rows.
        initial_validation: Validate on all rows before the first step, so that the report can compare the losses.
        final_validation: Validate on all rows after the last step.
        early_stopping_patience: Stop after this many validations in a row without a new best loss.
        evaluate_example: Validation row to use as the example: first, random, or its number; null for none. The model
            answers its prompt before and after training.
        examples: Number of example rows, starting with that one.
        exact_match: Answer this many validation prompts before and after training and report the fraction that matches
            exactly. Intended for short answers.
    """

    interval: IntOrAuto = AUTO
    max_new_tokens: Optional[int] = 100
    max_iters: Optional[int] = 100
    initial_validation: bool = True
    final_validation: bool = True
    early_stopping_patience: Optional[int] = None
    evaluate_example: Optional[Union[Literal["first", "random"], int]] = "first"
    examples: int = 1
    exact_match: Optional[int] = None

    def check(self) -> None:
        """Raise `UserError` for values that cannot run, all of them at once."""
        positive = "interval max_new_tokens max_iters exact_match early_stopping_patience"
        wrong = not_positive("eval", self, positive.split())
        if isinstance(self.evaluate_example, int) and self.evaluate_example < 0:
            wrong.append(f"--eval.evaluate_example {self.evaluate_example} is below 0")
        if self.exact_match is not None and self.max_new_tokens is None:
            wrong.append(f"--eval.exact_match {self.exact_match} needs answers; set --eval.max_new_tokens")
        if wrong:
            raise UserError("; ".join(wrong) + ".")


@dataclass
class LogArgs:
    """Names of the run in the logger, for wandb, mlflow, and trackio.

    Args:
        project: Project (wandb, trackio) or experiment (mlflow); by default litgpt.
        run: Name of the run; by default its out_dir.
        group: Name of a group of runs.
        teamspace: Ignored; accepted for compatibility with LitGPT.
        metadata: Ignored, like teamspace.
        log_model: Ignored, like teamspace.
        save_logs: Ignored, like teamspace.
        checkpoint_name: Ignored, like teamspace.
    """

    project: Optional[str] = None
    run: Optional[str] = None
    group: Optional[str] = None
    teamspace: Optional[str] = None
    metadata: Optional[dict[str, str]] = None
    log_model: bool = False
    save_logs: bool = True
    checkpoint_name: Optional[str] = None


def not_positive(group: str, options: Any, names: list[str]) -> list[str]:
    """What is wrong with those of the named options that are set and not above 0."""
    values = {name: getattr(options, name) for name in names}
    return [f"--{group}.{name} {v} must be above 0" for name, v in values.items() if v not in (None, AUTO) and v <= 0]


def record_setting(name: str, value: Any) -> None:
    """Put the value of an option that was left to the run into its settings, if there are any."""
    settings, (first, *others) = run_settings.get(), name.split(".")
    if settings and isinstance(settings.get(first), dict):  # else of another command, before a run from Python
        run_settings.set({**settings, first: with_value(settings[first], others, value)})


def with_value(settings: Any, keys: list[str], value: Any) -> Any:
    return {**settings, keys[0]: with_value(settings.get(keys[0]), keys[1:], value)} if keys else value
