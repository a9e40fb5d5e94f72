"""A training run from its options to its folder: check, load, plan, train, save."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Optional, Union

import torch
import yaml
from torch.optim import Optimizer

from litgpt.adapter_folder import is_adapter
from litgpt.args import EvalArgs, PrecisionName, QuantizeName, TrainArgs, run_settings
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.data.base import Loaded
from litgpt.data.batches import PackedRows, Rows
from litgpt.data.check import harm
from litgpt.data.tokens import Counts, TokenizedRows
from litgpt.errors import UserError
from litgpt.files import whole_folder, write_text
from litgpt.generate.parity import make_seal, stored_dtypes, write_seal
from litgpt.loading import Source
from litgpt.model import GPT
from litgpt.prompts import save_style
from litgpt.quantize import quantize as quantize_layers
from litgpt.train.examples import Examples
from litgpt.train.launch import (
    DTYPES,
    Accelerator,
    default_precision,
    make_fabric,
    peak_memory,
    pick_device,
    seed_everything,
)
from litgpt.train.loop import Plan, Result, fit, perplexity
from litgpt.train.loss import LossModel
from litgpt.train.method import Method
from litgpt.train.metrics import Metrics, plot
from litgpt.train.progress import Screen, duration, gigabytes
from litgpt.train.start import Start

HYPERPARAMETERS = "hyperparameters.yaml"


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
    logger_name: Literal["csv"] = "csv",
    seed: int = 1337,
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
        optimizer: A class of torch.optim, and its options.
        logger_name: Where the metrics go: metrics.csv.
        seed: For the weights that are drawn, the order of the rows, and dropout.
        overwrite: Whether a used out_dir may be written to; what an earlier run left there is removed.

    Raises:
        UserError: anything that the options, the folder or the data make impossible; nothing was written then.
    """
    train.check()
    eval.check()
    check_machine(devices, num_nodes, seed)
    check_out_dir(out_dir, overwrite)
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
    frozen = any(not p.requires_grad for p in model.parameters())
    name = precision or default_precision(device, all_trained=not frozen)
    if quantize is not None and not frozen:
        raise UserError(f"--quantize {quantize} is for frozen weights, and {method.name} trains all of them.")
    if quantize is not None and not name.endswith("-true"):
        raise UserError(f"--quantize {quantize} wants --precision bf16-true, 16-true or 32-true, not {name}.")
    n_all = sum(p.numel() for p in model.parameters())

    loaded = data.load(tokenizer, start.tokenizer_folder, row_limit(train, config, data))
    if problems := harm(loaded):
        raise UserError(" ".join(problems) + " See: litgpt data check, with the same options.")
    number = eval.evaluate_example
    if isinstance(number, int) and number >= len(loaded.val):
        raise UserError(f"--eval.evaluate_example {number}: there are {len(loaded.val)} validation rows.")
    train_rows, val_rows = units(loaded.train, train, config, data), units(loaded.val, train, config, data)
    plan = Plan.make(train, train_rows)

    fabric = make_fabric(accelerator, devices, num_nodes, name)
    train.check(fabric.world_size)
    fabric.launch()
    if device.type == "cpu" and fabric.world_size > num_nodes:
        torch.set_num_threads(max(1, torch.get_num_threads() * num_nodes // fabric.world_size))
    seed_everything(seed)
    start.fill(model, DTYPES[name], fabric.device)
    try:
        made = optimizer([p for p in model.parameters() if p.requires_grad])
    except ValueError as e:
        raise UserError(f"--optimizer: {e}.") from e
    if train.min_lr > made.param_groups[0]["lr"]:
        raise UserError(f"--train.min_lr {train.min_lr} is above the learning rate {made.param_groups[0]['lr']}.")
    wrapped, made = fabric.setup(LossModel(model), made)
    seed_everything(seed, fabric.global_rank)

    screen = Screen(active=fabric.is_global_zero)
    form = f"{name}, {quantize}" if quantize else name
    on = f"{fabric.world_size} x {fabric.device.type}, {form}, {torch.get_num_threads()} threads each"
    introduce(screen, method, start, model, n_all, loaded, train_rows, plan, train, on, out_dir)
    if fabric.is_global_zero:
        clear(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        write_settings(out_dir, name)

    def save(folder_name: str, seal: bool = False) -> None:
        if fabric.is_global_zero:
            with whole_folder(out_dir / folder_name) as folder:
                method.save(model, start, folder)
                start.copy_tokenizer(folder)
                if method.saves_style:
                    save_style(loaded.style, folder)
                write_settings(folder, name)
                if seal:
                    known = start.checkpoint if is_adapter(folder) else None
                    opened = Source.open(folder, base=known.folder if known else None)
                    stored = stored_dtypes(opened.checkpoint)
                    write_seal(make_seal(model, tokenizer, opened.style(), stored, quantize), folder)
        fabric.barrier()

    examples = Examples(model, tokenizer, loaded, eval)
    metrics = Metrics(out_dir / "metrics.csv" if fabric.is_global_zero else None)
    if fabric.is_global_zero:
        examples.show(screen, "before")
    try:
        result = fit(
            fabric, wrapped, made, train_rows, val_rows, plan, train, eval, seed, screen, metrics,
            save=lambda step: save(f"step-{step:06d}"),
        )  # fmt: skip
    finally:
        screen.stop()
        metrics.close()
    model.eval()
    if fabric.is_global_zero:
        examples.show(screen, "after")
    save("final", seal=True)
    if fabric.is_global_zero:
        drawn = plot(out_dir / "metrics.csv", out_dir / "loss.png")
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


def introduce(
    screen: Screen,
    method: Method,
    start: Start,
    model: GPT,
    n_all: int,
    loaded: Loaded,
    train_rows: Rows,
    plan: Plan,
    train: TrainArgs,
    on: str,
    out_dir: Path,
) -> None:
    """One screen: model, parameters, data, plan."""
    config, counts = start.config, loaded.counts
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    unit = "packs" if isinstance(train_rows, PackedRows) else "rows"
    tokens = train.global_batch_size * float(train_rows.lengths.float().mean())
    rows = [
        ("model", f"{start.name} ({config.model_type}, {config.n_layer} layers, width {config.n_embd})"),
        ("parameters", f"{n_trained:,} trainable of {n_all:,} ({n_trained / n_all:.2%})"),
        ("rows", describe_counts(counts) + ("; tokens from the cache" if loaded.cached else "")),
        ("training", describe(loaded.train)),
        ("validation", describe(loaded.val)),
        ("prompt style", f"{loaded.style.name}; trained: {'answers' if loaded.mask_prompt else 'prompts and answers'}"),
        (
            "plan",
            f"{plan.steps:,} steps of {train.global_batch_size} {unit} (about {tokens:,.0f} tokens), "
            f"micro-batch {train.micro_batch_size}",
        ),
        ("on", on),
        ("writes to", str(out_dir)),
    ]
    if isinstance(train_rows, PackedRows):
        full = float(train_rows.lengths.float().mean()) / int(train_rows.lengths.max())
        rows.insert(
            5, ("packs", f"{len(train_rows):,} of at most {int(train_rows.lengths.max()):,} tokens, {full:.1%} full")
        )
    screen.table(f"litgpt {method.name}", rows)
    if plan.cut_warmup is not None:
        screen.say(f"The warm-up of {plan.cut_warmup} steps is longer than the run; it is cut to {plan.warmup}.")


def check_machine(devices: Union[int, str], num_nodes: int, seed: int) -> None:
    """Raise `UserError` for numbers that no machine and no generator takes."""
    if isinstance(devices, int) and devices < 1:
        raise UserError(f"--devices {devices} must be above 0, or auto.")
    if num_nodes < 1:
        raise UserError(f"--num_nodes {num_nodes} must be above 0.")
    if not 0 <= seed < 2**48:
        raise UserError(f"--seed {seed} must be at least 0 and below 2^48.")


def check_out_dir(out_dir: Path, overwrite: bool) -> None:
    """Raise `UserError` if nothing may be written there."""
    above = next(p for p in (out_dir, *out_dir.parents) if p.exists())
    if not above.is_dir():
        raise UserError(f"--out_dir {out_dir}: {above} is a file; name a folder.")
    if not os.access(above, os.W_OK | os.X_OK) or (out_dir.is_symlink() and not out_dir.exists()):
        raise UserError(f"--out_dir {out_dir} cannot be written to.")
    if outputs(out_dir) and not overwrite:
        raise UserError(f"--out_dir {out_dir} holds an earlier run: name another, or give --overwrite true.")


def outputs(out_dir: Path) -> list[Path]:
    """What earlier runs left in `out_dir`."""
    patterns = ("final", "step-[0-9]*", "metrics.csv", "loss.png", HYPERPARAMETERS)
    return [p for pattern in patterns for p in out_dir.glob(pattern)]


def clear(out_dir: Path) -> None:
    for path in outputs(out_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_settings(folder: Path, precision: str) -> None:
    """The run's settings as a file for `--config` that makes the same run again."""
    settings = run_settings.get()
    if settings is not None:
        settings = {k: v for k, v in settings.items() if k != "overwrite"} | {"precision": precision}
        write_text(folder / HYPERPARAMETERS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def describe(rows: TokenizedRows) -> str:
    if not len(rows):
        return "none"
    return f"{len(rows):,} rows, {int(rows.lengths.sum()):,} tokens, longest {int(rows.lengths.max()):,}"


def describe_counts(counts: Counts) -> str:
    """What was read, and what became of it."""
    forms = ", ".join(f"{n:,} {form}" for form, n in counts.forms.items())
    others = {
        "dropped as too long": counts.too_long,
        "bad and skipped": counts.bad,
        "left out by their label": counts.left_out,
    }
    more = "".join(f", {n:,} {what}" for what, n in others.items() if n)
    return f"{counts.rows:,} read ({forms}): {counts.cut:,} cut, {counts.untrained:,} left out{more}"


def report(
    screen: Screen,
    result: Result,
    method: Method,
    out_dir: Path,
    memory: Optional[int],
    drawn: bool,
    scores: list[float],
) -> None:
    losses = " -> ".join(f"{loss:.4f}" for loss in ends(result.val_losses))
    perplexities = " -> ".join(perplexity(loss) for loss in ends(result.val_losses))
    rows = [
        ("training loss", f"{result.loss:.4f}"),
        *([("validation loss", losses), ("perplexity", perplexities)] if losses else []),
        *([("exact answers", " -> ".join(f"{score:.1%}" for score in scores))] if scores else []),
        ("time", f"{duration(result.seconds)} for {result.steps:,} steps"),
        ("speed", f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s, {result.tokens:,} tokens"),
        ("peak memory", gigabytes(memory)),
        ("result", str(out_dir / "final")),
        ("numbers", str(out_dir / "metrics.csv") + (f", {out_dir / 'loss.png'}" if drawn else "")),
    ]
    screen.table("Done", rows)
    screen.say("Next:")
    for command in method.next_commands:
        screen.say("  " + command.format(final=out_dir / "final"))
    if method.remark:
        screen.say(method.remark)


def ends(losses: list[tuple[int, float]]) -> list[float]:
    """The first and the last of the validation losses."""
    values = [loss for _, loss in losses]
    return [values[0], values[-1]] if len(values) > 1 else values
