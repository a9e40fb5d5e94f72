"""A training run from its options to its folder: check, load, plan, train, save."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional, Union

import torch
from filelock import FileLock
from torch.optim import Optimizer

from litgpt.checkpoint.folder import open_checkpoint
from litgpt.data import DataModule
from litgpt.data.base import TokenizedDataset
from litgpt.data.batches import Batch, PackedRows, Rows
from litgpt.data.check import check_ids, data_problems
from litgpt.data.named import or_alpaca
from litgpt.data.tokens import TokenizedRows, cache_folder
from litgpt.errors import UserError
from litgpt.methods.quantize import QuantizeName
from litgpt.methods.quantize import quantize as quantize_layers
from litgpt.model import GPT
from litgpt.model.blocks import check_compiler, compile_blocks, recompute
from litgpt.model.config import Config
from litgpt.model.devices import (
    DTYPES,
    Accelerator,
    PrecisionName,
    default_precision,
    peak_memory,
    pick_device,
    share_threads,
)
from litgpt.storage.outputs import write_single
from litgpt.text.chat_template import clock_at
from litgpt.text.prompts import STYLE_FILE, load_style
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.args import EvalArgs, LogArgs, LoggerName, TrainArgs
from litgpt.train.base_model import BaseModel
from litgpt.train.checks import check_options, check_quantize, check_start
from litgpt.train.devices.launch import (
    StrategyName,
    give_memory_back,
    layout,
    make_fabric,
    pick_strategy,
    seed_everything,
    started_by,
)
from litgpt.train.devices.ranks import is_first, together, watch
from litgpt.train.examples import Examples
from litgpt.train.faults import crash, in_words, spared
from litgpt.train.flops import FlopCounter
from litgpt.train.loggers import make_logger
from litgpt.train.loop import Plan, Result, fit, peak_rate
from litgpt.train.loss import LossModel
from litgpt.train.method import Method
from litgpt.train.metrics import METRICS, Metrics, lines_until, plot
from litgpt.train.optimizers import check_sharded, finished, ours, parameter_groups, remarks
from litgpt.train.progress import Screen
from litgpt.train.report import describe_rate, describe_stop, print_header, report
from litgpt.train.resume.find import (
    compare,
    first_start,
    is_finished,
    resume_hint,
    set_aside,
    to_resume,
    what_must_stay,
)
from litgpt.train.resume.folder import check_out_dir, clear, settings, taken, write_settings
from litgpt.train.resume.save import Saver
from litgpt.train.resume.state import TrainingState
from litgpt.train.signals import Signals, Stopped

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def run(
    method: Method,
    start: BaseModel,
    out_dir: Path,
    data: Optional[DataModule] = None,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    devices: Union[int, Literal["auto"]] = 1,
    num_nodes: int = 1,
    accelerator: Accelerator = "auto",
    strategy: StrategyName = "auto",
    fsdp_cpu_offload: bool = False,
    train: TrainArgs = TrainArgs(),  # noqa: B008
    eval: EvalArgs = EvalArgs(),  # noqa: B008
    optimizer: Callable[[Iterable], Optimizer] = torch.optim.AdamW,
    log: LogArgs = LogArgs(),  # noqa: B008
    logger_name: LoggerName = "csv",
    compile: bool = False,
    seed: int = 1337,
    resume: Union[bool, Literal["auto"], Path] = False,
    resume_with_changes: bool = False,
    overwrite: bool = False,
) -> Result:
    """Train a model by a method.

    Args:
        method: What is trained, and how it is saved.
        start: The model and its weights before the first step.
        out_dir: Where everything is written; `final/` in it is the result.
        data: The rows, for example JSON with --data.json_path FILE; by default Alpaca.
        precision: Of the weights that were there before, and of the products. By default bf16-true where the device
            computes it natively, else 32-true; where all weights are trained bf16-mixed on a GPU, else 32-true.
        quantize: Keep the frozen weights of the blocks in 4 or 8 bits, by bitsandbytes.
        devices: How many devices of each machine, or auto for all; under torchrun and SLURM as many as they started.
        num_nodes: How many machines; under torchrun and SLURM as many as they use.
        accelerator: The kind of device.
        strategy: How several devices share the work. With ddp each has the whole model; with fsdp each has a part of
            every weight, of its gradient and of the optimizer's state, so that larger models fit. auto is ddp where
            weights, gradients and the two moments of AdamW take at most 80 % of a device's memory, and where there is
            no other way (a quantized base, 16-mixed), else fsdp. On one device it has no effect.
        fsdp_cpu_offload: With fsdp on GPUs, keep these parts in the memory of the processor, which makes the update.
        train: How long, how much at a time, and how fast to learn.
        eval: When and how the model is judged.
        optimizer: AdamW, SGD, Muon, AdamW8bit, ... or the path of a class, and its options, such as --optimizer.lr.
        log: What the run is called in the logger.
        logger_name: Where the metrics go besides metrics.csv (csv: nowhere else): tensorboard, wandb (offline where
            nobody is logged in) or mlflow (to MLFLOW_TRACKING_URI), with files in out_dir/logs.
        compile: Compile the model's blocks (torch.compile): the first steps are slow, the others may be faster. Dropout
            then draws otherwise.
        seed: For the weights that are drawn, the order of the rows, and dropout.
        resume: Go on where a run stopped: true or auto with the newest whole checkpoint in out_dir (from the start if
            there is none), or with the checkpoint at this path. The numbers are those of a run that never stopped.
        resume_with_changes: Go on although settings changed that change the numbers.
        overwrite: Whether a used out_dir may be written to; what an earlier run left there is removed.

    Raises:
        UserError: anything that the options, the folder or the data make impossible; nothing was written then.
    """
    notes = check_options(train, eval, logger_name, log, devices, num_nodes, seed, resume, overwrite)
    data = or_alpaca(data)
    sources = [*start.places(), *data.places()]
    check_out_dir(out_dir, overwrite, resume is not False, sources)
    check_start(start, train)
    device = pick_device(accelerator)
    model = empty_model(method, start, quantize, device)
    tokenizer = start.tokenizer()
    if compile:
        check_compiler(device)
    frozen = any(not p.requires_grad for p in model.parameters())
    name = precision or default_precision(device, all_trained=not frozen)
    check_quantize(quantize, method, frozen, name)
    n_all = sum(p.numel() for p in model.parameters())
    devices, num_nodes = layout(device, devices, num_nodes)
    train = train.on(devices * num_nodes)
    shared = pick_strategy(strategy, model, name, device, devices, quantize)
    offload = fsdp_cpu_offload and shared == "fsdp" and device.type == "cuda"
    if devices * num_nodes == 1 and not offload:
        shared = "ddp"
    notes += remarks_on_strategy(strategy, shared, devices * num_nodes, fsdp_cpu_offload, offload)
    fabric = make_fabric(device, devices, num_nodes, name, shared, offload)
    watch(fabric)
    first = is_first(fabric)
    screen = Screen(active=first)
    done, last = False, list[Batch]()  # the micro-batch that is run, for the words on a full memory
    with (
        Signals(first) as signals,
        ExitStack() as held,
        together(fabric, signals),
        in_words(out_dir, last, train, quantize, not frozen),
    ):
        locked = resume is not False and out_dir.is_dir()
        if locked and first:
            held.enter_context(taken(out_dir))  # nobody else may write where the newest checkpoint is looked for
        checkpoint, words = to_resume(out_dir, resume)
        notes += words
        if resume is not False and is_finished(out_dir, settings(name), checkpoint is not None):
            screen.say(f"The run in {out_dir} is finished: its result is {out_dir / 'final'}.")
            return Result()
        held.enter_context(clock_at(first_start(checkpoint)))
        try:
            loaded = load_rows(data, tokenizer, start, train, eval, screen)
            train_rows, val_rows = (units(rows, train, start.config, data) for rows in (loaded.train, loaded.val))
            if eval.early_stopping_patience is not None and not len(val_rows):
                raise UserError("--eval.early_stopping_patience: there are no validation rows.")
            plan = Plan.make(train, train_rows)
            notes += remarks_on_style(loaded, start)

            fabric.launch()
            if fabric.broadcast(printed := loaded.style.printed_times()) != printed:
                raise UserError("The chat template prints the date, and the processes began on two: start them again.")
            share_threads(model, device, devices)
            seed_everything(seed)
            whole = LossModel(model)
            if shared == "fsdp":
                give_memory_back()
                fabric.strategy.shard(whole)  # type: ignore[attr-defined]
            weights = start if frozen or checkpoint is None else replace(start, checkpoint=open_checkpoint(checkpoint))
            weights.fill(model, DTYPES[name], fabric.device, torch.device("cpu") if offload else None)
            made = make_optimizer(optimizer, model, seed, name)
            rate = peak_rate(made, train)
            if train.min_lr > rate and train.lr_schedule != "constant":
                raise UserError(f"--train.min_lr {train.min_lr} is above the learning rate {rate}.")
            notes += remarks(made, fabric.device)
            schedule = [
                ("optimizer", f"{type(made).__name__}, {describe_rate(rate, plan, train)}"),
                *describe_stop(eval),
            ]
            result = Result()
            fixed = what_must_stay(name, loaded, plan, made, fabric.world_size, shared)
            taught = loaded.style if method.saves_style and not loaded.plain_text else None
            saver = Saver(
                fabric, method, start, whole, made, tokenizer, taught, result, fixed, name, quantize, not frozen,
                out_dir, train.keep_last,
            )  # fmt: skip
            state = TrainingState.read(checkpoint, mmap=shared == "fsdp") if checkpoint is not None else None
            if state is not None:
                notes += compare(state, fixed, resume_with_changes)
                saver.restore(state)
            if compile:
                compile_blocks(model)
            if train.activation_checkpointing:
                recompute(model)
            wrapped, made = fabric.setup(whole, made, move_to_device=shared != "fsdp")
            seed_everything(seed, fabric.global_rank)
            if state is not None:
                saver.restore_random(state)
            state = None  # its memory is free again

            form = f"{name}, {quantize}" if quantize else name
            n = torch.get_num_threads()
            on = f"{on_devices(fabric, shared)}, {form}, {n} thread{'s' * (n > 1)} each"
            print_header(screen, method, start, model, n_all, loaded, train_rows, plan, train, on, out_dir, schedule)
            for note in notes:
                screen.say(note)
            examples = Examples(whole, tokenizer, loaded, eval, result.scores, fabric.world_size)
            carried = lines_until(checkpoint.parent / METRICS, result.steps, result.judged) if checkpoint else []
            if first:
                if not locked:
                    held.enter_context(taken(out_dir))
                    check_out_dir(out_dir, overwrite, sources=sources)  # another run may have come before
                if locked:
                    set_aside(out_dir, checkpoint)
                if checkpoint is None:
                    clear(out_dir)
                write_settings(out_dir, name, write_single)
            resumed = checkpoint is not None
            logger = make_logger(logger_name, log, out_dir, settings(name), resumed) if first else None
            if logger is not None:
                screen.say(f"{logger_name}: {logger.where}")
            work: Optional[FlopCounter] = None
            with spared("MFU cannot be measured", fabric.world_size):
                work = FlopCounter.of(model, fabric.device, torch.bfloat16 if name == "bf16-mixed" else DTYPES[name])
            with Metrics(out_dir / METRICS if first else None, logger, carried) as metrics:
                if checkpoint is None:
                    examples.show(screen, "before")
                fit(
                    fabric, wrapped, made, train_rows, val_rows, plan, train, eval, seed, screen, metrics, result,
                    signals,
                    work=work,
                    save=saver.checkpoint,
                    fail=lambda *step: crash(fabric, whole, train_rows, tokenizer, out_dir, *step),
                    meet=lambda batch: last.__setitem__(slice(None), [batch]),
                )  # fmt: skip
                model.eval()
                saver.final()
                done, signals.holds = True, False
                if not fabric.broadcast(signals.code):  # a signal may have come to one rank alone
                    examples.show(screen, "after")
        except Stopped:
            screen.say(f"The result is {out_dir / 'final'}." if done else resume_hint(out_dir))
            raise
        finally:
            screen.stop()
        if first:
            drawn = False
            with spared("loss.png cannot be drawn"):
                drawn = plot(out_dir / METRICS, out_dir / "loss.png")
            with spared("The report cannot be made"):
                report(screen, result, method, out_dir, peak_memory(fabric.device), drawn, examples.scores)
    return result


def empty_model(method: Method, start: BaseModel, quantize: Optional[str], device: torch.device) -> GPT:
    """The model as the method changes it, without weights. Raises `UserError` where those to be read do not fit."""
    with torch.device("meta"):
        model = GPT(start.config)
    if quantize is not None:
        quantize_layers(model, quantize, device)
    method.apply(model)
    start.check(model)
    return model


def remarks_on_strategy(wanted: str, shared: str, world_size: int, offload: bool, offloads: bool) -> list[str]:
    """What is said about options of several devices that have no effect."""
    lines = []
    if wanted != "auto" and world_size == 1 and shared != wanted:
        lines.append(f"--strategy {wanted} has no effect: there is one device, which has everything.")
    if offload and not offloads:
        lines.append("--fsdp_cpu_offload true has no effect: it is for --strategy fsdp on GPUs.")
    return lines


def remarks_on_style(loaded: TokenizedDataset, start: BaseModel) -> list[str]:
    """What is said where the model was trained here with another prompt style."""
    if loaded.plain_text or not (start.tokenizer_folder / STYLE_FILE).is_file():
        return []
    before = load_style(start.tokenizer_folder)
    if before == loaded.style:
        return []
    return [f"The model was trained with the prompt style {before.name}; these rows have {loaded.style.name}."]


def load_rows(
    data: DataModule, tokenizer: Tokenizer, start: BaseModel, train: TrainArgs, eval: EvalArgs, screen: Screen
) -> TokenizedDataset:
    """The rows as tokens. Raises `UserError` where they would spoil the run."""
    turn = FileLock(cache_folder() / ".turn") if started_by() else nullcontext()  # the next one finds them in the cache
    with turn, screen.counting("rows tokenized") as say:
        limit = row_limit(train, start.config, data)
        loaded = data.load(tokenizer, start.tokenizer_folder, limit, say, start.config.block_size)
    check_ids(loaded, start.config.padded_vocab_size)
    if problems := data_problems(loaded):
        raise UserError(" ".join(problems) + " See: litgpt data check, with the same options.")
    number = eval.evaluate_example
    if isinstance(number, int) and number >= len(loaded.val):
        raise UserError(f"--eval.evaluate_example {number}: there are {len(loaded.val)} validation rows.")
    return loaded


def make_optimizer(make: Callable[[Iterable], Optimizer], model: GPT, seed: int, precision: str) -> Optimizer:
    """The optimizer of what is trained. Raises `UserError` for arguments, or weights, that it does not take."""
    groups, make = parameter_groups(model), ours(make)
    try:
        made = make(groups)
    except (TypeError, ValueError) as e:  # what a class says to options that are not its own
        raise UserError(f"--optimizer: {e}.") from e
    made = finished(made, seed, fuse=precision != "16-mixed")
    check_sharded(made)
    return made


def on_devices(fabric: "Fabric", shared: str) -> str:
    """What the run is on, in words."""
    words = f"{fabric.world_size} x {fabric.device.type}"
    machines = getattr(fabric.strategy, "num_nodes", 1)
    words += f" on {machines} machines" if machines > 1 else ""
    return f"{words} ({shared})" if fabric.world_size > 1 else words


def packed(train: TrainArgs, data: DataModule) -> bool:
    return data.packed if train.pack is None else train.pack


def row_limit(train: TrainArgs, config: Config, data: DataModule) -> int:
    """The longest row that is allowed, and the size of a pack, in tokens.

    Raises:
        UserError: more is asked for than the model reads.
    """
    if train.max_seq_length is not None and train.max_seq_length > config.block_size:
        field = "n_positions" if config.learned_positions else "max_position_embeddings"
        raise UserError(
            f"--train.max_seq_length {train.max_seq_length} is longer than what this model reads ({field} "
            f"{config.block_size}): set it to at most {config.block_size}, or leave it out."
        )
    return train.max_seq_length or (min(config.block_size, 2048) if packed(train, data) else config.block_size)


def units(rows: TokenizedRows, train: TrainArgs, config: Config, data: DataModule) -> Rows:
    """What the batch sizes count: the rows, or packs of them."""
    return PackedRows(rows, row_limit(train, config, data)) if packed(train, data) else rows
