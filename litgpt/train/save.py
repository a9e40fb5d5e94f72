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
from litgpt.prompts import PromptStyle, save_style
from litgpt.tokenizer import Tokenizer
from litgpt.train.folder import write_settings
from litgpt.train.loop import Result
from litgpt.train.method import Method
from litgpt.train.signals import Stopped
from litgpt.train.start import Start
from litgpt.train.state import OPTIMIZER, TrainingState, checkpoints, random_state, set_random_state, write_sums

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass
class Saver:
    """Writes folders that are there whole or not at all.

    Args:
        result: What the run has done so far, as the loop keeps it.
        settings: Those of the run, flat, to compare with when it goes on.
        precision: Of the run, by its name.
        quantize: How the base is quantized.
        whole: Whether the method saves every weight, so that the state need not.
        keep_last: How many checkpoints stay.
    """

    fabric: "Fabric"
    method: Method
    start: Start
    model: GPT
    optimizer: Optimizer
    tokenizer: Tokenizer
    style: PromptStyle
    result: Result
    settings: dict[str, Any]
    precision: str
    quantize: Optional[str]
    whole: bool
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

    def write(self, name: str, randoms: Optional[list[dict[str, torch.Tensor]]]) -> None:
        error: Optional[BaseException] = None
        if self.fabric.is_global_zero:
            try:
                with whole_folder(self.out_dir / name) as folder:
                    self.method.save(self.model, self.start, folder)
                    self.start.copy_tokenizer(folder)
                    if self.method.saves_style:
                        save_style(self.style, folder)
                    write_settings(folder, self.precision)
                    if randoms is None:
                        self.seal(folder)
                    else:
                        self.state(randoms).write(folder)
                        write_sums(folder, self.result.steps)
            except Exception as e:
                error = e
        if self.fabric.broadcast(error is not None):  # nobody waits for a rank that is gone
            raise error or Stopped(0)

    def seal(self, folder: Path) -> None:
        known = self.start.checkpoint if is_adapter(folder) else None
        opened = Source.open(folder, base=known.folder if known else None)
        stored = stored_dtypes(opened.checkpoint)
        write_seal(make_seal(self.model, self.tokenizer, opened.style(), stored, self.quantize), folder)

    def state(self, randoms: list[dict[str, torch.Tensor]]) -> TrainingState:
        trained = (
            {} if self.whole else {n: p.detach().cpu() for n, p in self.model.named_parameters() if p.requires_grad}
        )
        precision = self.fabric.strategy.precision.state_dict()
        progress = asdict(self.result) | {"precision": precision, "options": self.options}
        return TrainingState(trained, self.optimizer.state_dict(), randoms, progress, self.settings)

    def gather_random(self) -> list[dict[str, torch.Tensor]]:
        """The states of the generators of each rank."""
        own = random_state(self.fabric.device)
        if self.fabric.world_size == 1:
            return [own]
        gathered: Any = self.fabric.all_gather({name: bits.to(self.fabric.device) for name, bits in own.items()})
        ranks = range(self.fabric.world_size)
        return [{name: bits[rank].cpu() for name, bits in gathered.items()} for rank in ranks]

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Put back all but the weights of a `whole` method and the random states. The state of another kind of
        optimizer is left out.

        Raises:
            UserError: the state is that of another model.
        """
        own = dict(self.model.named_parameters())
        try:
            progress = dict(state.progress)
            precision, options = progress.pop("precision"), progress.pop("options")
            missing = [n for n, p in own.items() if p.requires_grad and n not in state.trained and not self.whole]
            if missing or (unknown := [n for n in state.trained if n not in own]):
                raise ValueError(f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(unknown)}")
            for name, weight in state.trained.items():
                own[name].copy_(weight)
            if state.settings.get(OPTIMIZER) == self.settings[OPTIMIZER]:
                self.optimizer.load_state_dict(state.optimizer)
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

    def restore_random(self, state: TrainingState) -> None:
        if len(state.random) == self.fabric.world_size:
            set_random_state(state.random[self.fabric.global_rank], self.fabric.device)


def own_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group as they are before the first step."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
