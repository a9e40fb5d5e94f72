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
from litgpt.train.faults import disk_full, is_disk_full
from litgpt.train.folder import write_settings
from litgpt.train.loop import Result
from litgpt.train.method import Method
from litgpt.train.start import Start
from litgpt.train.state import TrainingState, checkpoints, random_state, set_random_state, write_sums

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

    def checkpoint(self, name: str) -> None:
        """Write a folder with everything that the rest of the run needs. To be called on all ranks."""
        randoms = self.gather_random()
        self.write(name, randoms)
        if self.fabric.is_global_zero and self.keep_last is not None:
            for old in checkpoints(self.out_dir)[self.keep_last :]:
                shutil.rmtree(old)

    def final(self) -> None:
        """Write and seal the result. To be called on all ranks."""
        self.write("final", None)

    def write(self, name: str, randoms: Optional[list[dict[str, torch.Tensor]]]) -> None:
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
                        write_sums(folder)
            except Exception as e:
                if is_disk_full(e, self.out_dir):
                    raise disk_full(self.out_dir, next(iter(checkpoints(self.out_dir)), None)) from e
                raise
        self.fabric.barrier()

    def seal(self, folder: Path) -> None:
        known = self.start.checkpoint if is_adapter(folder) else None
        opened = Source.open(folder, base=known.folder if known else None)
        stored = stored_dtypes(opened.checkpoint)
        write_seal(make_seal(self.model, self.tokenizer, opened.style(), stored, self.quantize), folder)

    def state(self, randoms: list[dict[str, torch.Tensor]]) -> TrainingState:
        trained = (
            {} if self.whole else {n: p.detach().cpu() for n, p in self.model.named_parameters() if p.requires_grad}
        )
        progress = asdict(self.result) | {"precision": self.fabric.strategy.precision.state_dict()}
        return TrainingState(trained, self.optimizer.state_dict(), randoms, progress, self.settings)

    def gather_random(self) -> list[dict[str, torch.Tensor]]:
        """The states of the generators of each rank."""
        own = random_state(self.fabric.device)
        if self.fabric.world_size == 1:
            return [own]
        gathered: Any = self.fabric.all_gather({name: bits.to(self.fabric.device) for name, bits in own.items()})
        return [{name: bits[rank].cpu() for name, bits in gathered.items()} for rank in range(self.fabric.world_size)]

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Put back all but the weights of a `whole` method and the random states.

        Raises:
            UserError: the state is that of another model or optimizer.
        """
        own = dict(self.model.named_parameters())
        progress = dict(state.progress)
        precision = progress.pop("precision")
        try:
            for name, weight in state.trained.items():
                own[name].copy_(weight)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state.optimizer)
            for group, rate in zip(self.optimizer.param_groups, rates):
                group["lr"] = rate  # the loop makes each step's from the run's
            if precision:
                self.fabric.strategy.precision.load_state_dict(precision)
            for key, value in progress.items():
                setattr(self.result, key, value)
        except (KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f"--resume: the checkpoint does not fit this run: {' '.join(str(e).split())}") from e

    def restore_random(self, state: TrainingState) -> None:
        if len(state.random) == self.fabric.world_size:
            set_random_state(state.random[self.fabric.global_rank], self.fabric.device)
