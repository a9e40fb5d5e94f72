"""A training run from its options to its folder: check, load, plan, train, save."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional, Union

import torch
from torch.optim import Optimizer

from litgpt.args import EvalArgs, LogArgs, LoggerName, PrecisionName, QuantizeName, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.data.batches import Batch, PackedRows, Rows
from litgpt.data.check import harm
from litgpt.data.tokens import TokenizedRows
from litgpt.errors import UserError
from litgpt.imports import importing
from litgpt.lit_folder import open_checkpoint
from litgpt.model import GPT
from litgpt.quantize import quantize as quantize_layers
from litgpt.train.blocks import check_compiler, compile_blocks, recompute
from litgpt.train.examples import Examples
from litgpt.train.faults import crash, in_words
from litgpt.train.folder import check_out_dir, clear, settings, taken, write_settings
from litgpt.train.launch import (
    DTYPES,
    Accelerator,
    default_precision,
    make_fabric,
    peak_memory,
    pick_device,
    seed_everything,
)
from litgpt.train.loggers import check_logger, make_logger
from litgpt.train.loop import Plan, Result, fit, peak_rate
from litgpt.train.loss import LossModel
from litgpt.train.method import Method
from litgpt.train.metrics import METRICS, Metrics, lines_until, plot
from litgpt.train.optimizers import finished, parameter_groups, remarks
from litgpt.train.progress import Screen
from litgpt.train.report import describe_rate, describe_stop, introduce, report
from litgpt.train.resume import compare, farewell, is_finished, set_aside, to_resume, what_must_stay
from litgpt.train.save import Saver
from litgpt.train.signals import Signals, Stopped
from litgpt.train.speed import Work
from litgpt.train.start import Start
from litgpt.train.state import TrainingState


def run(
    method: Method,
    start: Start,
    out_dir: Path,
    data: Optional[DataModule] = None,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    devices: Union[int, Literal["auto"]] = 1,
    num_nodes: int = 1,
    accelerator: Accelerator = "auto",
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
        data: The rows, for example JSON with --data.json_path FILE.
        precision: Of the weights that were there before, and of the products. By default bf16-true where the device
            computes it natively, else 32-true; where all weights are trained bf16-mixed on a GPU, else 32-true.
        quantize: Keep the frozen weights of the blocks in 4 or 8 bits, by bitsandbytes.
        devices: How many devices, or auto for all.
        num_nodes: How many machines.
        accelerator: The kind of device.
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
    train.check()
    eval.check()
    notes = check_logger(logger_name, log)
    check_machine(devices, num_nodes, seed)
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it: choose one.")
    check_out_dir(out_dir, overwrite or resume is not False)
    if data is None:
        raise UserError("No data: name it with --data, for example --data JSON --data.json_path FILE.")
    config, source = start.config, start.tokenizer_folder.resolve()
    if overwrite and out_dir.resolve() in (source, *source.parents):
        raise UserError(f"--out_dir {out_dir} holds the model itself: choose another folder.")
    if train.tie_embeddings not in (None, config.tie_embeddings):
        raise UserError(f"--train.tie_embeddings {train.tie_embeddings}: the checkpoint has {config.tie_embeddings}.")
    with torch.device("meta"):
        model = GPT(config)
    device = pick_device(accelerator)
    if quantize is not None:
        quantize_layers(model, quantize, device)
    method.apply(model)
    start.check(model)
    tokenizer = start.tokenizer()
    if compile:
        check_compiler(device)
    frozen = any(not p.requires_grad for p in model.parameters())
    name = precision or default_precision(device, all_trained=not frozen)
    if quantize is not None and not frozen:
        raise UserError(f"--quantize {quantize} is for frozen weights, and {method.name} trains all of them.")
    if quantize is not None and not name.endswith("-true"):
        raise UserError(f"--quantize {quantize} wants --precision bf16-true, 16-true or 32-true, not {name}.")
    n_all = sum(p.numel() for p in model.parameters())

    with importing():
        from lightning.fabric.utilities.rank_zero import rank_zero_only

    first = getattr(rank_zero_only, "rank", 0) == 0
    screen = Screen(active=first)
    done, last = False, list[Batch]()  # the micro-batch that is run, for the words on a full memory
    with Signals(first) as signals, ExitStack() as held, in_words(out_dir, last, train, quantize, not frozen):
        locked = resume is not False and out_dir.is_dir()
        if locked and first:
            held.enter_context(taken(out_dir))  # nobody else may write where the newest checkpoint is looked for
        checkpoint, words = to_resume(out_dir, resume)
        notes += words
        if resume is not False and is_finished(out_dir, settings(name), checkpoint is not None):
            screen.say(f"The run in {out_dir} is finished: its result is {out_dir / 'final'}.")
            return Result()
        try:
            with screen.counting("rows tokenized") as say:
                loaded = data.load(tokenizer, start.tokenizer_folder, row_limit(train, config, data), say)
            if problems := harm(loaded):
                raise UserError(" ".join(problems) + " See: litgpt data check, with the same options.")
            number = eval.evaluate_example
            if isinstance(number, int) and number >= len(loaded.val):
                raise UserError(f"--eval.evaluate_example {number}: there are {len(loaded.val)} validation rows.")
            train_rows, val_rows = units(loaded.train, train, config, data), units(loaded.val, train, config, data)
            if eval.early_stopping_patience is not None and not len(val_rows):
                raise UserError("--eval.early_stopping_patience: there are no validation rows.")

            fabric = make_fabric(accelerator, devices, num_nodes, name)
            train = train.on(fabric.world_size)
            plan = Plan.make(train, train_rows)
            fabric.launch()
            if device.type == "cpu" and fabric.world_size > num_nodes:
                torch.set_num_threads(max(1, torch.get_num_threads() * num_nodes // fabric.world_size))
            seed_everything(seed)
            weights = start if frozen or checkpoint is None else replace(start, checkpoint=open_checkpoint(checkpoint))
            weights.fill(model, DTYPES[name], fabric.device)
            try:
                made = finished(optimizer(parameter_groups(model)), seed, fuse=name != "16-mixed")
            except (TypeError, ValueError) as e:
                raise UserError(f"--optimizer: {e}.") from e
            rate = peak_rate(made, train)
            if train.min_lr > rate and train.lr_schedule != "constant":
                raise UserError(f"--train.min_lr {train.min_lr} is above the learning rate {rate}.")
            notes += remarks(made, fabric.device)
            schedule = [
                ("optimizer", f"{type(made).__name__}, {describe_rate(rate, plan, train)}"),
                *describe_stop(eval),
            ]
            result = Result()
            fixed = what_must_stay(name, loaded, plan, made, fabric.world_size)
            saver = Saver(
                fabric, method, start, model, made, tokenizer, loaded.style, result, fixed, name, quantize, not frozen,
                out_dir, train.keep_last,
            )  # fmt: skip
            state = TrainingState.read(checkpoint) if checkpoint is not None else None
            if state is not None:
                notes += compare(state, fixed, resume_with_changes)
                saver.restore(state)
            if compile:
                compile_blocks(model)
            if train.activation_checkpointing:
                recompute(model)
            wrapped, made = fabric.setup(LossModel(model), made)
            seed_everything(seed, fabric.global_rank)
            if state is not None:
                saver.restore_random(state)
            state = None  # its memory is free again

            form = f"{name}, {quantize}" if quantize else name
            on = f"{fabric.world_size} x {fabric.device.type}, {form}, {torch.get_num_threads()} threads each"
            introduce(screen, method, start, model, n_all, loaded, train_rows, plan, train, on, out_dir, schedule)
            for note in notes:
                screen.say(note)
            examples = Examples(model, tokenizer, loaded, eval, result.scores)
            carried = lines_until(checkpoint.parent / METRICS, result.steps, result.judged) if checkpoint else []
            if first:
                if not locked:
                    held.enter_context(taken(out_dir))
                    check_out_dir(out_dir, overwrite)  # another run may have come before
                if locked:
                    set_aside(out_dir, checkpoint)
                if checkpoint is None:
                    clear(out_dir)
                write_settings(out_dir, name)
            logger = make_logger(logger_name, log, out_dir, settings(name)) if first else None
            if logger is not None:
                screen.say(f"{logger_name}: {logger.where}")
            with Metrics(out_dir / METRICS if first else None, logger, carried) as metrics:
                if first and checkpoint is None:
                    examples.show(screen, "before")
                fit(
                    fabric, wrapped, made, train_rows, val_rows, plan, train, eval, seed, screen, metrics, result,
                    signals,
                    work=Work.of(model, fabric.device, torch.bfloat16 if name == "bf16-mixed" else DTYPES[name]),
                    save=saver.checkpoint,
                    fail=lambda *step: crash(fabric, LossModel(model), train_rows, tokenizer, out_dir, *step),
                    meet=lambda batch: last.__setitem__(slice(None), [batch]),
                )  # fmt: skip
                model.eval()
                saver.final()
                done, signals.holds = True, False
                if first and not signals.code:
                    examples.show(screen, "after")
        except Stopped:
            screen.say(f"The result is {out_dir / 'final'}." if done else farewell(out_dir))
            raise
        finally:
            screen.stop()
        if first:
            drawn = plot(out_dir / METRICS, out_dir / "loss.png")
            report(screen, result, method, out_dir, peak_memory(fabric.device), drawn, examples.scores)
    return result


def packed(train: TrainArgs, data: DataModule) -> bool:
    return data.packed if train.pack is None else train.pack


def row_limit(train: TrainArgs, config: Config, data: DataModule) -> int:
    """The longest row that is allowed, and the size of a pack, in tokens."""
    largest = min(config.block_size, 2048) if packed(train, data) else config.block_size
    return min(train.max_seq_length or largest, config.block_size)


def units(rows: TokenizedRows, train: TrainArgs, config: Config, data: DataModule) -> Rows:
    """What the batch sizes count: the rows, or packs of them."""
    return PackedRows(rows, row_limit(train, config, data)) if packed(train, data) else rows


def check_machine(devices: Union[int, str], num_nodes: int, seed: int) -> None:
    """Raise `UserError` for numbers that no machine and no generator takes."""
    if isinstance(devices, int) and devices < 1:
        raise UserError(f"--devices {devices} must be above 0, or auto.")
    if num_nodes < 1:
        raise UserError(f"--num_nodes {num_nodes} must be above 0.")
    if not 0 <= seed < 2**48:
        raise UserError(f"--seed {seed} must be at least 0 and below 2^48.")
