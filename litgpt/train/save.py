"""What a run writes into its folder: checkpoints that it can go on from, and the result."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch.optim import Optimizer

from litgpt.adapter_folder import is_adapter
from litgpt.errors import UserError
from litgpt.files import whole_folder
from litgpt.generate.parity import make_seal, stored_dtypes, write_seal
from litgpt.loading import Source
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, load_style, save_style
from litgpt.shards import full, is_sharded, like, my_rows, on_first_rank, put
from litgpt.tokenizer import Tokenizer
from litgpt.train.faults import spared
from litgpt.train.folder import write_settings
from litgpt.train.loop import Result
from litgpt.train.loss import LossModel
from litgpt.train.method import Method
from litgpt.train.signals import Stopped
from litgpt.train.start import Start
from litgpt.train.state import OPTIMIZER, TrainingState, checkpoints, random_state, set_random_state, write_sums

if TYPE_CHECKING:
    from lightning.fabric import Fabric

ROUNDING = "rounding-"  # among the random states: those of an optimizer that rounds stochastically


@dataclass
class Saver:
    """Writes folders that are there whole or not at all.

    Args:
        result: What the run has done so far, as the loop keeps it.
        settings: Those of the run, flat, to compare with when it goes on.
        precision: Of the run, by its name.
        quantize: How the base is quantized.
        saves_all: Whether the method saves every weight, so that the state need not.
        keep_last: How many checkpoints stay.
    """

    fabric: "Fabric"
    method: Method
    start: Start
    loss_model: LossModel
    optimizer: Optimizer
    tokenizer: Tokenizer
    style: PromptStyle
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
                shutil.rmtree(old, ignore_errors=True)  # what stays is tried again after the next one

    def final(self) -> None:
        """Write and seal the result. To be called on all ranks."""
        self.write("final", None)

    @property
    def model(self) -> GPT:
        return self.loss_model.gpt

    def write(self, name: str, randoms: Optional[list[dict[str, torch.Tensor]]]) -> None:
        error: Optional[BaseException] = None
        seal: Optional[dict[str, Any]] = None
        if randoms is None:
            with spared("The reference answers of the result cannot be made", self.fabric.world_size):
                seal = self.answers()

        def work() -> None:
            nonlocal error
            try:
                with whole_folder(self.out_dir / name) as folder:
                    self.method.save(self.model, self.start, folder)
                    self.start.copy_tokenizer(folder)
                    if self.method.saves_style:
                        save_style(self.style, folder)
                    write_settings(folder, self.precision)
                    stored: list[str] = []
                    if seal is not None:
                        with spared("The reference answers of the result cannot be kept"):
                            stored = self.stored(folder)
                    if seal is not None and stored:
                        write_seal({**seal, "stored": stored}, folder)
                    if randoms is not None:
                        self.state(randoms).write(folder)
                        write_sums(folder, self.result.steps)
            except Exception as e:
                error = e

        states = [t for state in self.optimizer.state.values() for t in state.values()]
        on_first_rank(self.fabric.global_rank, [*self.model.parameters(), *states], work)
        if self.fabric.broadcast(error is not None):  # nobody waits for a rank that is gone
            raise error or Stopped(0)

    def answers(self) -> dict[str, Any]:
        """The seal, but for the types of the weights in the folder."""
        style = self.style if self.method.saves_style else load_style(self.start.tokenizer_folder)
        return self.loss_model.read(lambda gpt: make_seal(gpt, self.tokenizer, style, [], self.quantize))

    def stored(self, folder: Path) -> list[str]:
        known = self.start.checkpoint if is_adapter(folder) else None
        return stored_dtypes(Source.open(folder, base=known.folder if known else None).checkpoint)

    def state(self, randoms: list[dict[str, torch.Tensor]]) -> TrainingState:
        own = {} if self.saves_all else dict(self.model.named_parameters())
        trained = {name: full(p).detach().cpu() for name, p in own.items() if p.requires_grad}
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            number: {k: full(v).cpu() if is_sharded(v) else v for k, v in state.items()}
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
        own = dict(self.model.named_parameters())
        try:
            progress = dict(state.progress)
            precision, options = progress.pop("precision"), progress.pop("options")
            missing = [n for n, p in own.items() if p.requires_grad and n not in state.trained and not self.saves_all]
            if missing or (unknown := [n for n in state.trained if n not in own]):
                raise ValueError(f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(unknown)}")
            for name, weight in state.trained.items():
                if weight.shape != own[name].shape:
                    raise ValueError(f"{name} is {tuple(weight.shape)}, not {tuple(own[name].shape)}")
                put(own[name], 0, weight)
            if state.settings.get(OPTIMIZER) == self.settings[OPTIMIZER]:
                self.optimizer.load_state_dict(self.sharded(state.optimizer))
                for group, then, now in zip(self.optimizer.param_groups, options, self.options):
                    # the rate of each step is made from the run's; other options are as they were unless they changed
                    group |= {k: v for k, v in now.items() if k == "lr" or v != then.get(k)}
            if precision:
                self.fabric.strategy.precision.load_state_dict(precision)
            for key, value in progress.items():
                if not hasattr(self.result, key):
                    raise KeyError(key)
                setattr(self.result, key, value)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f"--resume: the checkpoint does not fit this run: {' '.join(str(e).split())}.") from e

    def sharded(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer, of which each rank takes its rows of what belongs to a sharded weight."""
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]

        def part(weight: torch.Tensor, value: Any) -> Any:
            if not torch.is_tensor(value):
                return value
            if not is_sharded(weight) or value.shape != weight.shape:
                return value.clone()
            return like(weight, value[my_rows(weight)].to(weight.device, copy=True))

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


def own_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group as they are before the first step."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
