"""What a run writes into its folder: checkpoints that it can go on from, and the result."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch.optim import Optimizer

from litgpt.errors import UserError
from litgpt.errors import kind as kind_of
from litgpt.generate.reference_outputs import make_reference_outputs, stored_dtypes, write_reference_outputs
from litgpt.methods.adapter_folder import is_adapter
from litgpt.methods.model_source import ModelSource
from litgpt.model import GPT
from litgpt.model.sharded import full_tensor, is_sharded, my_rows, on_first_rank, put, shard_like
from litgpt.storage.outputs import discard, new_folder, write_sums
from litgpt.text.prompts import PromptStyle, load_style, save_style
from litgpt.text.tokenizer import Tokenizer, save_stop
from litgpt.train.base_model import BaseModel
from litgpt.train.faults import spared
from litgpt.train.loop import Result
from litgpt.train.loss import LossModel
from litgpt.train.method import Method
from litgpt.train.resume.folder import write_settings
from litgpt.train.resume.state import (
    OPTIMIZER,
    TrainingState,
    checkpoints,
    is_dict,
    random_state,
    set_random_state,
)
from litgpt.train.signals import Stopped

if TYPE_CHECKING:
    from lightning.fabric import Fabric

ROUNDING = "rounding-"  # among the random states: those of an optimizer that rounds stochastically
LIKE_THE_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of an optimizer's state: its shape


@dataclass
class Saver:
    """Writes folders that are there whole or not at all.

    Args:
        result: What the run has done so far, as the loop keeps it.
        style: How prompts become text for the result; None to leave that as it was.
        settings: Those of the run, flat, to compare with when it goes on.
        precision: Of the run, by its name.
        quantize: How the base is quantized.
        saves_all: Whether the method saves every weight, so that the state need not.
        keep_last: How many checkpoints stay.
    """

    fabric: "Fabric"
    method: Method
    start: BaseModel
    loss_model: LossModel
    optimizer: Optimizer
    tokenizer: Tokenizer
    style: Optional[PromptStyle]
    result: Result
    settings: dict[str, Any]
    precision: str
    quantize: Optional[str]
    saves_all: bool
    out_dir: Path
    keep_last: Optional[int]

    def __post_init__(self) -> None:
        self.options = own_options(self.optimizer)

    def checkpoint(self, name: str) -> None:
        """Write a folder with everything that the rest of the run needs. To be called on all ranks."""
        randoms = self.gather_random()
        self.write(name, randoms)
        if self.fabric.is_global_zero and self.keep_last is not None:
            for old in checkpoints(self.out_dir)[self.keep_last :]:
                discard(old)

    def final(self) -> None:
        """Write the result and its reference outputs. To be called on all ranks."""
        self.write("final", None)

    @property
    def model(self) -> GPT:
        return self.loss_model.gpt

    def write(self, name: str, randoms: Optional[list[dict[str, torch.Tensor]]]) -> None:
        error: Optional[BaseException] = None
        reference: Optional[dict[str, Any]] = None
        if randoms is None:
            with spared("The reference answers of the result cannot be made", self.fabric.world_size):
                reference = self.answers()

        def work() -> None:
            nonlocal error
            try:
                with new_folder(self.out_dir / name) as folder:
                    self.method.save(self.model, self.start, folder)
                    self.start.copy_tokenizer(folder)
                    if self.style is not None:
                        save_style(self.style, folder, self.tokenizer.prefix, self.tokenizer.eos_token or "")
                        save_stop(folder, self.tokenizer.trained_stop(self.style), self.start.fields)
                    write_settings(folder, self.precision)
                    stored: list[str] = []
                    if reference is not None:
                        with spared("The reference answers of the result cannot be kept"):
                            stored = self.stored(folder)
                    if reference is not None and stored:
                        write_reference_outputs({**reference, "stored": stored}, folder)
                    if randoms is not None:
                        self.state(randoms).write(folder)
                        write_sums(folder, step=self.result.steps)
            except Exception as e:
                error = e

        states = [t for state in self.optimizer.state.values() for t in state.values()]
        on_first_rank(self.fabric.global_rank, [*self.model.parameters(), *states], work)
        if self.fabric.broadcast(error is not None):  # nobody waits for a rank that is gone
            raise error or Stopped(0)

    def answers(self) -> dict[str, Any]:
        """The reference outputs, without the types of the weights in the folder."""
        style = self.style or load_style(self.start.tokenizer_folder)
        return self.loss_model.read(lambda gpt: make_reference_outputs(gpt, self.tokenizer, style, [], self.quantize))

    def stored(self, folder: Path) -> list[str]:
        known = self.start.checkpoint if is_adapter(folder) else None
        return stored_dtypes(ModelSource.open(folder, base=known.folder if known else None).checkpoint)

    def state(self, randoms: list[dict[str, torch.Tensor]]) -> TrainingState:
        own = {} if self.saves_all else dict(self.model.named_parameters())
        trained = {name: full_tensor(p).detach().cpu() for name, p in own.items() if p.requires_grad}
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            number: {k: full_tensor(v).cpu() if is_sharded(v) else v for k, v in state.items()}
            for number, state in optimizer["state"].items()
        }
        precision = self.fabric.strategy.precision.state_dict()
        progress = asdict(self.result) | {"precision": precision, "options": self.options}
        return TrainingState(trained, optimizer, randoms, progress, self.settings)

    def gather_random(self) -> list[dict[str, torch.Tensor]]:
        """The states of the generators of each rank."""
        own = random_state(self.fabric.device)
        if self.fabric.world_size == 1:
            return [own]
        for kind, generator in getattr(self.optimizer, "generators", {}).items():
            own[ROUNDING + kind] = generator.get_state()  # each rank rounds its own rows
        gathered: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(gathered, own)
        return gathered

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Put back all but the random states, and the weights where the method saves all. The state of another kind of
        optimizer is left out.

        Raises:
            UserError: the state is that of another model.
        """
        if wrong := self.misfits(state):
            raise UserError(f"--resume: the checkpoint does not fit this run: {'; '.join(wrong)}.")
        own = dict(self.model.named_parameters())
        for name, weight in state.trained.items():
            put(own[name], 0, weight)
        progress = dict(state.progress)
        precision, options = progress.pop("precision"), progress.pop("options")
        if self.same_optimizer(state):
            self.optimizer.load_state_dict(self.sharded(state.optimizer))
            for group, then, now in zip(self.optimizer.param_groups, options, self.options):
                # the rate of each step is made from the run's; other options are as they were unless they changed
                group |= {k: v for k, v in now.items() if k == "lr" or v != then.get(k)}
        if precision:
            self.fabric.strategy.precision.load_state_dict(precision)
        for key, value in progress.items():
            setattr(self.result, key, value)

    def same_optimizer(self, state: TrainingState) -> bool:
        return state.settings.get(OPTIMIZER) == self.settings[OPTIMIZER]

    def misfits(self, state: TrainingState) -> list[str]:
        """What in a state is not of this run, in words, so that `restore` need not expect it."""
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        wrong = [f"it lacks {name}" for name in own if name not in state.trained and not self.saves_all]
        wrong += [f"it has {name}" for name in state.trained if name not in own]
        wrong += [
            f"{name} is {tuple(weight.shape)}, not {tuple(own[name].shape)}"
            for name, weight in state.trained.items()
            if name in own and weight.shape != own[name].shape
        ]
        wrong += [f"{name} of the progress is {what}" for name, what in wrong_progress(state.progress).items()]
        precision, now = state.progress.get("precision"), self.fabric.strategy.precision.state_dict()
        if is_dict(precision, str) and precision and now and precision.keys() != now.keys():
            wrong.append(f"the precision has {', '.join(precision)}")
        return wrong + (self.wrong_optimizer(state) if self.same_optimizer(state) else [])

    def wrong_optimizer(self, state: TrainingState) -> list[str]:
        groups = [(len(group["params"]), group["params"]) for group in self.optimizer.param_groups]
        then = [len(group["params"]) for group in state.optimizer["param_groups"]]
        options = state.progress.get("options")
        if then != [n for n, _ in groups] or not isinstance(options, list) or len(options) != len(then):
            return [f"the optimizer has groups of {then} weights, not {[n for n, _ in groups]}"]
        weights = [p for _, parameters in groups for p in parameters]
        unknown = [n for n in state.optimizer["state"] if not 0 <= n < len(weights)]
        return [f"the optimizer knows a weight {n}" for n in unknown] + [
            f"the optimizer's {name} of weight {n} is not of its shape"
            for n, known in state.optimizer["state"].items()
            for name in LIKE_THE_WEIGHT
            if n not in unknown and name in known and getattr(known[name], "shape", None) != weights[n].shape
        ]

    def sharded(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer, of which each rank takes its rows of what belongs to a sharded weight."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]

        def part(weight: torch.Tensor, value: Any) -> Any:
            if not torch.is_tensor(value):
                return value
            if not is_sharded(weight) or value.shape != weight.shape:
                return value.clone()
            return shard_like(weight, value[my_rows(weight)].to(weight.device, copy=True))

        states = optimizer["state"].items()
        return optimizer | {
            "state": {number: {k: part(weights[number], v) for k, v in state.items()} for number, state in states}
        }

    def restore_random(self, state: TrainingState) -> None:
        if len(state.random) == self.fabric.world_size:
            own = state.random[self.fabric.global_rank]
            set_random_state(own, self.fabric.device)
            for name in (n for n in own if n.startswith(ROUNDING)):
                self.optimizer.generator(torch.device(name.removeprefix(ROUNDING))).set_state(own[name].clone())  # type: ignore[attr-defined]


def wrong_progress(progress: dict[str, Any]) -> dict[str, str]:
    """Those parts of the progress in a state that are not those of a `Result`, and what is wrong with each."""
    kinds: dict[str, Any] = {f.name: type(getattr(Result(), f.name)) for f in fields(Result)}
    kinds |= {"precision": dict, "options": list}
    allowed = {name: (int, float) if kind is float else kind for name, kind in kinds.items()}
    wrong = {name: "not known" for name in progress if name not in kinds}
    wrong |= {name: "missing" for name in kinds if name not in progress}
    wrong |= {k: kind_of(v) for k, v in progress.items() if k in allowed and not isinstance(v, allowed[k])}
    pairs = progress.get("val_losses")
    if isinstance(pairs, list) and not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        wrong["val_losses"] = "not in pairs"
    if not is_dict(progress.get("precision", {}), str, lambda v: isinstance(v, (int, float))):
        wrong["precision"] = "not of numbers"
    options = progress.get("options")
    if isinstance(options, list) and not all(is_dict(group, str) for group in options):
        wrong["options"] = "not in groups"
    return wrong


def own_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group as they are before the first step."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
