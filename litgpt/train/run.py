"""A training run, from its options to its result."""

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional, Union

import torch
from torch.optim import Optimizer

from litgpt.checkpoint.folder import open_checkpoint
from litgpt.data.batches import Batch
from litgpt.data.data_module import DataModule
from litgpt.errors import UserError
from litgpt.methods.quantize import QuantizeName
from litgpt.methods.quantize import quantize as quantize_layers
from litgpt.model.blocks import check_compiler, compile_blocks, recompute
from litgpt.model.devices import (
    DTYPES,
    MATMULS,
    Accelerator,
    PrecisionName,
    default_training_precision,
    pick_device,
    share_threads,
    tf32,
    uses_tf32,
)
from litgpt.model.gpt import GPT
from litgpt.storage.outputs import write_single
from litgpt.text.prompt_style import clock_at
from litgpt.train.args import AUTO, EvalArgs, LogArgs, LoggerName, PlanArgs, TrainArgs, planning, repeated
from litgpt.train.base_model import BaseModel
from litgpt.train.control import set_rate
from litgpt.train.devices import launch
from litgpt.train.devices.launch import StrategyName, make_fabric
from litgpt.train.devices.ranks import is_first, together, watch
from litgpt.train.examples import Examples
from litgpt.train.faults import in_words, spared
from litgpt.train.flops import FlopCounter
from litgpt.train.learning_rate import takes_default
from litgpt.train.loggers import check_logger, make_logger
from litgpt.train.loop import Trainer
from litgpt.train.loss import LossModel
from litgpt.train.memory.bound import upper_bound
from litgpt.train.method import Method
from litgpt.train.metrics import EVENT, METRICS, Metrics, lines_until
from litgpt.train.micro_batch import LARGEST_ON_CPU, settle_micro_batch
from litgpt.train.optimizers import check_sharded, finished, ours, parameter_groups, remarks
from litgpt.train.progress import Screen
from litgpt.train.report import print_header, print_report
from litgpt.train.result import TrainingResult
from litgpt.train.resume.find import (
    compare,
    extend,
    first_start,
    is_complete,
    is_finished,
    resume_hint,
    set_aside,
    settings_of,
    to_resume,
)
from litgpt.train.resume.folder import check_out_dir, clear, settings, taken, write_settings
from litgpt.train.resume.recorded import RATES, take_recorded
from litgpt.train.resume.save import Saver
from litgpt.train.resume.state import TrainingState
from litgpt.train.rows import changed_style, load_dataset, row_limit, uses_packs
from litgpt.train.schedule import NEW_PROGRESS, RENAMED_PROGRESS, Plan, Result
from litgpt.train.signals import Signals, Stopped

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass
class Run:
    """Trains a model with one method. Call it to run.

    Args:
        method: What is trained and how it is saved.
        base_model: The model before the first step.
        out_dir: Output folder; the result is in final/.
        data: Training data: files, a folder, hf:ORG/NAME, or the name of a data set. Defaults to Alpaca.
        precision: Precision of the base weights and of the matrix multiplications. By default bf16-true if the device
            supports it natively, else 32-true. If all weights are trained, bf16-mixed on such a GPU, else 32-true. On
            CUDA GPUs without bfloat16, 16-mixed, or 32-true with fsdp.
        quantize: Quantize the frozen weights of the blocks to 4 or 8 bits with bitsandbytes; mxfp4 keeps the
            experts of gpt-oss in the 4 bits of its files.
        devices: Devices per machine, or auto for all of them. Set by torchrun or SLURM if they start the run.
        num_nodes: Number of machines. Set by torchrun or SLURM if they start the run.
        accelerator: Type of device.
        strategy: How devices share the work. ddp keeps the model on every device; fsdp shards weights, gradients, and
            optimizer state, so that larger models fit. auto picks fsdp if weights, gradients, and AdamW's state take
            more than 80% of a device's memory, unless the base is quantized or the precision is 16-mixed.
        fsdp_cpu_offload: With fsdp on GPUs, keep the shards in CPU memory and run the optimizer there.
        train: Training options.
        eval: Validation options.
        optimizer: Optimizer: AdamW, SGD, Muon, AdamW8bit, ..., or a class path. Set its options with --optimizer.lr
            and so on; see --train.learning_rate for the default rate.
        log: Names of the run in the logger.
        logger_name: Where to log besides metrics.csv; csv for nowhere else. wandb works offline if you are not logged
            in, mlflow logs to MLFLOW_TRACKING_URI and trackio to TRACKIO_DIR if set. Their files are in out_dir/logs.
        compile: Compile the blocks with torch.compile. The first steps are slow; later ones may be faster. Dropout
            draws different random numbers.
        seed: Seed for initial weights, row order, and dropout.
        resume: Resume from the newest complete checkpoint in out_dir (true or auto; starts over if there is none), or
            from the checkpoint at this path. The result is the same as without the interruption.
        resume_with_changes: Resume even if settings that affect the result have changed.
        overwrite: Remove what an earlier run left in out_dir.
        dry_run: Print how much memory the run will need, and which settings need less, and stop.
        report: Write report.html into the output folder: a page with the settings, curves, and examples of the run.
    """

    method: Method
    base_model: BaseModel
    out_dir: Path
    data: Optional[DataModule] = None
    precision: Optional[PrecisionName] = None
    quantize: Optional[QuantizeName] = None
    devices: Union[int, Literal["auto"]] = 1
    num_nodes: int = 1
    accelerator: Accelerator = "auto"
    strategy: StrategyName = "auto"
    fsdp_cpu_offload: bool = False
    train: TrainArgs = field(default_factory=TrainArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    optimizer: Callable[[Iterable], Optimizer] = torch.optim.AdamW
    log: LogArgs = field(default_factory=LogArgs)
    logger_name: LoggerName = "csv"
    compile: bool = False
    seed: int = 1337
    resume: Union[bool, Literal["auto"], Path] = False
    resume_with_changes: bool = False
    overwrite: bool = False
    dry_run: bool = False
    report: bool = True

    def __post_init__(self) -> None:
        self.out_dir = Path(self.out_dir)  # a text, from Python

    def __call__(self) -> Optional[TrainingResult]:
        """Run. Returns None if the run is only planned. Raises `UserError`, before anything is written, if the options,
        the data, or the folder do not allow it, and `Stopped` if a signal or --train.pause_after ended the run."""
        if (args := planning.get()) is not None or self.dry_run:
            from litgpt.train.memory.plan import plan

            plan(self, args or PlanArgs())
            return None
        self.check()
        self.pick_devices()
        self.last_batch: Optional[Batch] = None
        self.result, self.is_saved = Result(), False
        with (
            Signals(self.is_first) as self.signals,
            ExitStack() as self.held,
            together(self.fabric, self.signals),
            in_words(self),
        ):
            if self.find_checkpoint():
                self.screen.say(
                    f"The run in {self.out_dir} is finished. Its result is {self.out_dir / 'final'}. To extend it, "
                    "raise --train.epochs or --train.max_steps."
                )
                return TrainingResult.read(self.out_dir)
            self.held.enter_context(clock_at(first_start(self.checkpoint)))
            try:
                self.load()
                self.check_memory()
                self.build()
                settle_micro_batch(self)
                print_header(self)
                self.metrics: Metrics = self.open_metrics()
                try:
                    with self.metrics:
                        self.fit()
                        self.save()
                finally:
                    self.write_report()
            except Stopped:
                final = f"The result is {self.out_dir / 'final'}."
                self.screen.say(final if self.is_saved else resume_hint(self.out_dir))
                raise
            finally:
                self.screen.stop()
            result = self.training_result()
            if self.is_first:
                with spared("Cannot print the report"):
                    print_report(self, result)
        return result

    def check(self) -> None:
        """Check the options, without weights."""
        self.train.check()
        self.eval.check()
        self.notes = check_logger(self.logger_name, self.log) + self.train.unused()
        launch.check_machine(self.devices, self.num_nodes, self.seed)
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run and --overwrite removes it. Pass only one of them.")
        self.source = self.method.objective.source(self.data)
        self.inputs = [*self.base_model.places(), *self.source.places()]
        check_out_dir(self.out_dir, self.overwrite, self.resume is not False, self.inputs)
        self.base_model.check_tied(self.train.tie_embeddings)
        self.device = pick_device(self.accelerator)
        self.model = empty_model(self.method, self.base_model, self.quantize, self.device)
        self.tokenizer = self.base_model.tokenizer()
        self.row_limit = row_limit(self.train, self.base_model.config, self.source)
        if self.compile:
            check_compiler(self.device)
        self.is_frozen = any(not p.requires_grad for p in self.model.parameters())
        self.precision_name = self.precision or default_training_precision(self.device, not self.is_frozen)
        self.method.check_quantize(self.quantize, self.is_frozen)
        self.notes += self.method.notes(self.model)
        self.n_parameters = sum(p.numel() for p in self.model.parameters())
        self.default_rate: Optional[float] = None
        self.rate_origin = ""  # of a default learning rate, for the header
        rule, width = self.method.learning_rate, self.base_model.config.n_embd
        if rule is not None and self.train.learning_rate is None and takes_default(self.optimizer):
            self.default_rate, self.rate_origin = rule(width), f"default of {self.method.name} for width {width}"

    def pick_devices(self) -> None:
        self.devices_per_node, n_nodes = launch.layout(self.device, self.devices, self.num_nodes)
        world_size, memory = self.devices_per_node * n_nodes, launch.device_memory(self.device, self.devices_per_node)
        self.world_size = world_size
        self.picks_micro_batch = self.train.micro_batch_size == AUTO and self.train.gradient_accumulation_iters is None
        largest = None if self.device.type == "cuda" else LARGEST_ON_CPU
        self.train = self.train.on(world_size)
        self.use_micro_batch(self.train.micro_batch_sizes(world_size, largest))
        if self.precision is None and self.precision_name == "16-mixed" and world_size > 1:
            exact = "32-true"  # fsdp cannot scale gradients
            needed = launch.pick_strategy(self.strategy, self.model, exact, self.quantize, memory)
            self.precision_name = exact if needed == "fsdp" else self.precision_name
        self.sharing: str = launch.pick_strategy(self.strategy, self.model, self.precision_name, self.quantize, memory)
        self.offloads = self.fsdp_cpu_offload and self.sharing == "fsdp" and self.device.type == "cuda"
        if world_size == 1 and not self.offloads:
            self.sharing = "ddp"
        self.notes += launch.unused_strategy(
            self.strategy, self.sharing, world_size, self.fsdp_cpu_offload, self.offloads
        )
        self.fabric: Fabric = make_fabric(
            self.device, self.devices_per_node, n_nodes, self.precision_name, self.sharing, self.offloads
        )
        watch(self.fabric)
        self.is_first = is_first(self.fabric)
        self.screen = Screen(active=self.is_first)

    def use_micro_batch(self, sizes: list[int]) -> None:
        """Use the first of these sizes that fits in memory."""
        self.micro_batch_sizes = sizes
        self.train = replace(self.train, micro_batch_size=sizes[0]).on(self.world_size)

    def find_checkpoint(self) -> bool:
        """Find the checkpoint to resume from. Returns whether the run is already finished."""
        self.is_locked = self.resume is not False and self.out_dir.is_dir()
        if self.is_locked and self.is_first:
            self.held.enter_context(taken(self.out_dir))  # no other run may write the newest checkpoint
        self.checkpoint, notes = to_resume(self.out_dir, self.resume)
        self.notes += notes
        take_recorded(self)
        self.extends = self.checkpoint is not None and is_complete(self.checkpoint.parent, self.checkpoint)
        now = settings_of(self.train, self.precision_name)
        return self.resume is not False and is_finished(self.out_dir, self.checkpoint, now)

    def load(self) -> None:
        """Load the rows and plan the steps."""
        self.dataset = load_dataset(self)
        capacity = self.row_limit if uses_packs(self.train, self.source) else None
        self.train_rows, self.val_rows = (
            self.method.objective.rows(rows, capacity) for rows in (self.dataset.train, self.dataset.val)
        )
        self.plan = Plan(self.train, self.train_rows, self.method.warmup_steps)
        if self.checkpoint is None:
            self.plan.check_patience(self.eval)
        self.notes += self.dataset.notes() + changed_style(self.dataset, self.base_model)
        self.notes += self.method.objective.notes(self)

    def check_memory(self) -> None:
        """Raise `UserError` if the run needs more memory than its device has. Predicting that takes seconds, so it is
        only done if the run is not sure to fit."""
        memory, smallest = launch.usable_memory(self.device, self.devices_per_node), self.micro_batch_sizes[-1]
        self.train = replace(self.train, micro_batch_size=smallest)  # until larger ones are tried
        if memory is not None and upper_bound(self, smallest) > memory:
            from litgpt.train.memory.fit import check_fits

            check_fits(self)

    def explain_memory(self) -> None:
        """Print which settings need less memory than those of this run, which ran out of it."""
        if self.is_first and self.fabric.world_size == 1:
            from litgpt.train.memory.fit import explain

            with spared("Cannot tell which settings fit"):
                explain(self)

    def build(self) -> None:
        """Start the processes, load the weights, and restore the checkpoint."""
        fabric = self.fabric
        fabric.launch()
        if fabric.broadcast(printed := self.dataset.style.printed_times()) != printed:
            raise UserError("The chat template prints the date, and the processes started on different days. Retry.")
        share_threads(self.model, self.device, self.devices_per_node)
        launch.seed_everything(self.seed)
        self.loss_model: LossModel = self.method.objective.loss_model(self.model)
        if self.sharing == "fsdp":
            launch.give_memory_back()
            fabric.strategy.shard(self.loss_model, MATMULS.get(self.precision_name))  # type: ignore[attr-defined]
        self.fill()
        self.prepare()
        optimizer = self.make_optimizer()
        self.saver = self.make_saver(optimizer)
        state = None
        if self.checkpoint is not None:
            state = TrainingState.read(self.checkpoint, mmap=self.sharing == "fsdp")
            state.progress = NEW_PROGRESS | {RENAMED_PROGRESS.get(name, name): v for name, v in state.progress.items()}
            self.notes += compare(state, self.saver.settings, self)
            self.saver.restore(state)
            self.take_events(state)
            self.plan = Plan(self.train, self.train_rows, self.method.warmup_steps, self.result)
            self.notes += extend(self, state) if self.extends else []
        if self.compile:
            compile_blocks(self.model)
        if self.train.activation_checkpointing:
            recompute(self.model, offload=self.train.activation_checkpointing == "offload")
        self.fabric_model, self.fabric_optimizer = fabric.setup(
            self.loss_model, optimizer, move_to_device=self.moves_model
        )
        launch.seed_everything(self.seed, fabric.global_rank)
        if state is not None:
            self.saver.restore_random(state)

    def take_events(self, state: TrainingState) -> None:
        """Keep the learning rate that `litgpt ctl` set before the checkpoint, unless the options have changed it."""
        self.new_rate = any(state.settings.get(name) != self.saver.settings.get(name) for name in RATES)
        self.result.events = [e for e in self.result.events if not (self.new_rate and e[1].startswith("lr"))]
        set_rate(self)

    def prepare(self) -> None:
        """Let the objective compute what it needs of the model before the first step."""
        self.method.objective.prepare(self)

    def fill(self, resumes: bool = True) -> None:
        """Load the weights, of the checkpoint if it has all of them. Without `resumes`, those before the first step."""
        weights = self.base_model
        if resumes and not self.is_frozen and self.checkpoint is not None:
            weights = replace(weights, checkpoint=open_checkpoint(self.checkpoint))
        shards = torch.device("cpu") if self.offloads else None
        weights.fill(self.model, DTYPES[self.precision_name], self.fabric.device, shards)

    @property
    def moves_model(self) -> bool:
        """Whether the weights are not where they belong when they are loaded."""
        return self.sharing != "fsdp"

    def make_saver(self, optimizer: Optimizer) -> Saver:
        return Saver(self, optimizer)

    def make_optimizer(self) -> Optimizer:
        groups, make = parameter_groups(self.model), ours(self.optimizer)
        try:
            optimizer = make(groups) if self.default_rate is None else make(groups, lr=self.default_rate)
        except (TypeError, ValueError) as e:  # raised for arguments that the class does not accept
            raise UserError(f"--optimizer: {e}.") from e
        optimizer = finished(optimizer, self.seed, fuse=self.precision_name != "16-mixed")
        check_sharded(optimizer)
        rate = self.train.learning_rate
        self.peak_lr: float = optimizer.param_groups[0]["lr"] if rate is None else rate
        if self.train.min_lr > self.peak_lr and self.train.lr_schedule != "constant":
            raise UserError(f"--train.min_lr {self.train.min_lr} is above the learning rate {self.peak_lr}.")
        self.notes += remarks(optimizer, self.fabric.device)
        return optimizer

    def open_metrics(self) -> Metrics:
        """Take the output folder for this run, and start its logs."""
        carried = [{"step": str(step), EVENT: text} for step, text in repeated.get()]
        if self.checkpoint is not None:
            metrics = self.checkpoint.parent / METRICS
            carried = lines_until(metrics, self.result.steps, self.result.last_eval_step)
            carried = [row for row in carried if not (self.new_rate and row.get(EVENT, "").startswith("lr"))]
        if not self.is_first:
            return Metrics(None)
        if self.is_locked:
            set_aside(self.out_dir, self.checkpoint)
        else:
            self.held.enter_context(taken(self.out_dir))
            check_out_dir(self.out_dir, self.overwrite, sources=self.inputs)  # another run may have started meanwhile
        if self.checkpoint is None:
            clear(self.out_dir)
        write_settings(self.out_dir, self.precision_name, write_single)
        resumed = self.checkpoint is not None
        logger = make_logger(self.logger_name, self.log, self.out_dir, settings(self.precision_name), resumed)
        if logger is not None:
            self.screen.say(f"{self.logger_name}: {logger.where}")
        names = self.method.objective.metrics
        more = [prefix + name for prefix in ("", "val_") for name in names]
        return Metrics(self.out_dir / METRICS, logger, carried, more)

    def fit(self) -> None:
        """Train."""
        self.flops: Optional[FlopCounter] = None
        self.utilization: Optional[float] = None
        with spared("Cannot measure the utilization", self.fabric.world_size):
            dtype = MATMULS.get(self.precision_name, DTYPES[self.precision_name])
            self.flops = FlopCounter.of(self.model, self.fabric.device, dtype)
        self.examples = Examples(self)
        if self.checkpoint is None:
            self.examples.show("before")
        with tf32(uses_tf32(self.fabric.device, self.precision_name)):  # not for the outputs of the result
            Trainer(self).fit()

    def save(self) -> None:
        """Save the result, then show what the model answers now."""
        self.model.eval()
        self.saver.final()
        self.is_saved, self.signals.holds = True, False
        if not self.fabric.broadcast(self.signals.code):  # a signal may have reached only one rank
            self.examples.show("after")

    def write_report(self) -> None:
        """Write the report, however the run ends. If it ends with an error, that is the one to say."""
        self.reported: Optional[Path] = None
        if self.report and self.is_first:
            with suppress(Exception) if sys.exc_info()[0] else spared("Cannot write the report"):
                from litgpt.train.run_report.page import write_report

                self.reported = write_report(self.out_dir)

    def training_result(self) -> TrainingResult:
        return TrainingResult.of(self.result, self.out_dir, partial=self.n_eval_rows < len(self.val_rows))

    @property
    def can_quantize(self) -> bool:
        """Whether --quantize is possible, and not yet used."""
        return self.is_frozen and self.quantize is None and self.strategy != "fsdp"

    @property
    def n_eval_rows(self) -> int:
        """How many rows a validation during training reads. A micro-batch size that the run picked does not count:
        another one must not give another loss."""
        if self.eval.max_iters is None:
            return len(self.val_rows)
        rows = 1 if self.picks_micro_batch else self.train.micro_rows
        return min(len(self.val_rows), self.eval.max_iters * self.fabric.world_size * rows)


def empty_model(method: Method, base_model: BaseModel, quantize: Optional[str], device: torch.device) -> GPT:
    """The model as the method changes it, without weights. Raises `UserError` if the base's weights do not fit it."""
    with torch.device("meta"):
        model = GPT(base_model.config)
    if quantize is not None:
        quantize_layers(model, quantize, device)
    method.apply(model)
    base_model.check_model(model)
    return model
