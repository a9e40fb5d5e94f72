"""Writes the folders of a run: its result, and checkpoints from which it can resume."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch.optim import Optimizer

from litgpt.checkpoint.hub import RESULTS
from litgpt.errors import UserError
from litgpt.generate.reference_outputs import make_reference_outputs, stored_dtypes, write_reference_outputs
from litgpt.methods.adapter_folder import is_adapter
from litgpt.methods.model_source import ModelSource
from litgpt.model.sharded import full_tensor, is_sharded, my_rows, on_first_rank, put, reshard, shard_like
from litgpt.storage.outputs import discard, new_folder, write_sums
from litgpt.text.prompts import load_style, save_style
from litgpt.text.tokenizer import save_stops
from litgpt.train.card import write_run_card
from litgpt.train.faults import spared
from litgpt.train.metrics import is_event
from litgpt.train.resume.find import what_must_stay
from litgpt.train.resume.folder import write_settings
from litgpt.train.resume.state import OPTIMIZER, TrainingState, checkpoints, is_dict, random_state, set_random_state
from litgpt.train.run_lock import write_lock
from litgpt.train.schedule import Result
from litgpt.train.signals import Stopped

if TYPE_CHECKING:
    from litgpt.train.run import Run

ROUNDING = "rounding-"  # prefix of the random states of optimizers that round stochastically
LIKE_THE_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # optimizer state of a weight's shape
PARTS: dict[str, Callable[[Any], bool]] = {  # checks of the elements of the progress
    "val_losses": lambda v: all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in v),
    "events": lambda v: all(map(is_event, v)),
    "precision": lambda v: is_dict(v, str, lambda number: isinstance(number, (int, float))),
    "options": lambda v: all(is_dict(group, str) for group in v),
}


class Saver:
    """Writes the folders of a run, which are complete or absent."""

    def __init__(self, run: "Run", optimizer: Optimizer) -> None:
        self.fabric, self.method, self.start, self.result = run.fabric, run.method, run.base_model, run.result
        self.model, self.loss_model = run.model, run.loss_model
        self.optimizer, self.tokenizer, self.save = optimizer, run.tokenizer, run.method.save
        self.precision, self.quantize = run.precision_name, run.quantize
        self.out_dir, self.keep_last = run.out_dir, run.train.kept_checkpoints
        self.write_card, self.write_lock = partial(write_run_card, run), partial(write_lock, run)
        self.saves_all = not run.is_frozen  # the method saves all weights, so the training state need not
        records_style = run.method.saves_style and not run.dataset.plain_text
        self.style = run.dataset.style if records_style else None  # None keeps the base model's
        self.settings = what_must_stay(run, optimizer)
        # the options before the first step
        self.options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    def checkpoint(self, name: str) -> None:
        """Write a checkpoint. All ranks must call this."""
        randoms = self.gather_random()

        def add_state(folder: Path) -> None:
            self.state(randoms).write(folder)
            write_sums(folder, step=self.result.steps)

        self.write(name, add_state)
        if self.fabric.is_global_zero and self.keep_last is not None:
            for old in checkpoints(self.out_dir)[self.keep_last :]:
                discard(old)

    def final(self) -> None:
        """Write the result with its reference outputs. All ranks must call this."""
        outputs: Optional[dict[str, Any]] = None
        if self.method.finish is not None:
            self.save = self.method.finish(self.model, self.start)
        with spared("Cannot compute the reference outputs of the result", self.fabric.world_size):
            style = self.style or load_style(self.start.style_folder)
            outputs = self.loss_model.read(
                lambda gpt: make_reference_outputs(gpt, self.tokenizer, style, [], self.quantize)
            )

        def add_outputs(folder: Path) -> None:
            stored: list[str] = []
            with spared("Cannot save the reference outputs of the result"):
                known = self.start.checkpoint if is_adapter(folder) else None
                base = known.folder if known else None
                stored = stored_dtypes(ModelSource.open(folder, base=base).checkpoint)
            if stored and outputs is not None:
                write_reference_outputs({**outputs, "stored": stored}, folder)

        def add(folder: Path) -> None:
            if outputs is not None:
                add_outputs(folder)
            write_sums(folder, step=self.result.steps)

        self.write("final", add)

    def write(self, name: str, add: Callable[[Path], None]) -> None:
        """Write a folder: model, tokenizer, settings and what `add` writes. All ranks must call this."""
        reshard(self.loss_model)  # what a validation gathered: memory that a file shares cannot be freed
        error: Optional[BaseException] = None

        def work() -> None:
            nonlocal error
            try:
                with new_folder(self.out_dir / name) as folder:
                    self.save(self.model, self.start, folder)
                    self.start.copy_tokenizer(folder)
                    if self.style is not None:
                        save_style(self.style, folder, self.tokenizer)
                        save_stops(folder, self.tokenizer, self.style, self.start.fields)
                    write_settings(folder, self.precision)
                    if name in RESULTS:
                        self.write_card(folder, name)
                        with spared("Cannot write run.lock"):
                            self.write_lock(folder)
                    add(folder)
            except Exception as e:
                error = e

        states = [t for state in self.optimizer.state.values() for t in state.values()]
        on_first_rank(self.fabric.global_rank, [*self.model.parameters(), *states], work)
        if self.fabric.broadcast(error is not None):  # the other ranks must not wait for this one
            raise error or Stopped(0)

    def state(self, randoms: list[dict[str, torch.Tensor]]) -> TrainingState:
        parameters = {} if self.saves_all else dict(self.model.named_parameters())
        trained = {name: full_tensor(p).detach().cpu() for name, p in parameters.items() if p.requires_grad}
        precision = self.fabric.strategy.precision.state_dict()
        progress = asdict(self.result) | {"precision": precision, "options": self.options}
        return TrainingState(trained, self.optimizer.state_dict(), randoms, progress, self.settings)

    def gather_random(self) -> list[dict[str, torch.Tensor]]:
        """The states of all ranks' random generators."""
        own = random_state(self.fabric.device)
        if self.fabric.world_size == 1:
            return [own]
        for kind, generator in getattr(self.optimizer, "generators", {}).items():
            own[ROUNDING + kind] = generator.get_state()  # each rank rounds its own shards
        gathered: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(gathered, own)
        return gathered

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Restore everything except random states, and except the weights if the method saves all of them. Ignores the
        state of an optimizer of another class. Raises `UserError` if the state is from another model."""
        if wrong := self.mismatches(state):
            raise UserError(f"--resume: The checkpoint does not match this run: {'; '.join(wrong)}.")
        parameters = dict(self.model.named_parameters())
        for name, weight in state.trained.items():
            put(parameters[name], 0, weight)
        if self.same_optimizer(state):
            self.optimizer.load_state_dict(self.sharded(state.optimizer))
            for group, then, now in zip(self.optimizer.param_groups, state.progress["options"], self.options):
                # changed options take effect; `lr` is the peak, which the loop schedules
                group |= {k: v for k, v in now.items() if k == "lr" or v != then.get(k)}
        if state.progress["precision"]:
            self.fabric.strategy.precision.load_state_dict(state.progress["precision"])
        for name in asdict(self.result):
            setattr(self.result, name, state.progress[name])

    def same_optimizer(self, state: TrainingState) -> bool:
        return state.settings.get(OPTIMIZER) == self.settings[OPTIMIZER]

    def mismatches(self, state: TrainingState) -> list[str]:
        """What in a state is not from this run."""
        parameters = {} if self.saves_all else dict(self.model.named_parameters())
        expected = {name: tuple(p.shape) for name, p in parameters.items() if p.requires_grad}
        found = {name: tuple(weight.shape) for name, weight in state.trained.items()}
        wrong = [
            f"{name} has shape {found.get(name)}, expected {expected.get(name)}"
            for name in sorted({*expected, *found})
            if expected.get(name) != found.get(name)
        ]
        wrong += wrong_progress(state.progress)
        precision, now = state.progress.get("precision"), self.fabric.strategy.precision.state_dict()
        if is_dict(precision, str) and precision and now and precision.keys() != now.keys():
            wrong.append(f"the precision has the fields {', '.join(precision)}")
        if self.same_optimizer(state):
            wrong += self.wrong_optimizer(state)
        return wrong

    def wrong_optimizer(self, state: TrainingState) -> list[str]:
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        then = [len(group["params"]) for group in state.optimizer["param_groups"]]
        options = state.progress.get("options")
        if then != sizes or not isinstance(options, list) or len(options) != len(then):
            return [f"the optimizer has groups of {then} weights, expected {sizes}"]
        states = state.optimizer["state"].items()
        return [f"the optimizer has the state of an unknown weight {n}" for n, _ in states if n >= len(weights)] + [
            f"the optimizer's {name} of weight {n} has another shape"
            for n, values in states
            for name in LIKE_THE_WEIGHT
            if n < len(weights) and name in values and getattr(values[name], "shape", None) != weights[n].shape
        ]

    def sharded(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer with this rank's rows of what belongs to sharded weights."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]

        def shard(weight: torch.Tensor, value: Any) -> Any:
            if not torch.is_tensor(value):
                return value
            if not is_sharded(weight) or value.shape != weight.shape:
                return value.clone()
            return shard_like(weight, value[my_rows(weight)].to(weight.device, copy=True))

        states = {n: {k: shard(weights[n], v) for k, v in state.items()} for n, state in optimizer["state"].items()}
        return optimizer | {"state": states}

    def restore_random(self, state: TrainingState) -> None:
        if len(state.random) == self.fabric.world_size:
            own = state.random[self.fabric.global_rank]
            set_random_state(own, self.fabric.device)
            for name in (n for n in own if n.startswith(ROUNDING)):
                device = torch.device(name.removeprefix(ROUNDING))
                self.optimizer.generator(device).set_state(own[name].clone())  # type: ignore[attr-defined]


def wrong_progress(progress: dict[str, Any]) -> list[str]:
    """The parts of a state's progress that are not those of a `Result`."""
    expected = asdict(Result()) | {"precision": {}, "options": []}
    wrong = [f"{name} of the progress is unknown" for name in progress if name not in expected]
    for name, like in expected.items():
        kind = (int, float) if isinstance(like, float) else type(like)
        if name not in progress:
            wrong.append(f"{name} of the progress is missing")
        elif not isinstance(progress[name], kind) or not PARTS.get(name, lambda v: True)(progress[name]):
            wrong.append(f"{name} of the progress is invalid")
    return wrong
