"""The summaries that a run prints before it starts and when it is done."""

import math
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from litgpt.checkpoint.hub import PICO, repository_id
from litgpt.data.batches import PackedRows, Rows
from litgpt.data.tokens import Counts, TokenizedRows
from litgpt.errors import install_command
from litgpt.methods.adapter_folder import is_adapter
from litgpt.model.devices import peak_memory, uses_tf32
from litgpt.train.args import TrainArgs
from litgpt.train.faults import spared
from litgpt.train.loop import perplexity
from litgpt.train.metrics import METRICS, PLOT
from litgpt.train.progress import duration, gigabytes, percent, unbroken
from litgpt.train.result import TrainingResult
from litgpt.train.resume.folder import HYPERPARAMETERS
from litgpt.train.schedule import Plan

if TYPE_CHECKING:
    from litgpt.train.run import Run

NEEDED = {"serve": "fastapi", "export": "gguf"}  # packages of the extras of the same names


def print_header(run: "Run") -> None:
    """Print the model, the data, the schedule, and the notes of a run."""
    base, dataset, plan, n_all = run.base_model, run.dataset, run.plan, run.n_parameters
    config = base.config
    n_trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    trained = "answers" if dataset.mask_prompt else "prompts and answers"
    optimizer, patience = type(run.saver.optimizer).__name__, run.eval.early_stopping_patience
    rows = {
        "model": f"{unbroken(base.name)} ({config.model_type}, {config.n_layer} layers, width {config.n_embd})",
        "adapter": unbroken(adapter.folder) if (adapter := base.initial_adapter) else "",
        "parameters": f"{n_trained:,} trainable of {n_all:,} ({n_trained / n_all:.2%})",
        "rows": describe_counts(dataset.counts) + ("; tokens from the cache" if dataset.cached else ""),
        "training": describe_rows(dataset.train),
        "validation": describe_rows(dataset.val),
        "packs": describe_packs(run.train_rows),
        "prompt style": f"{dataset.style.name}; loss on {trained}",
        **run.method.objective.settings(),
        "schedule": describe_schedule(plan, run.train, run.train_rows),
        "optimizer": f"{optimizer}, {describe_learning_rate(run.peak_lr, plan, run.train, run.rate_origin)}",
        "early stopping": f"after {patience} validations in a row without a new best loss" if patience else "",
        "device": describe_devices(run),
        "output": unbroken(run.out_dir),
    }
    run.screen.table(f"litgpt {run.method.name}", rows)
    if plan.requested_warmup is not None:
        what = "run" if (plan.decay or math.inf) >= (plan.steps or math.inf) else "decay"
        run.screen.say(
            f"The warmup of {plan.requested_warmup} steps is longer than the {what}. It is shortened to {plan.warmup}."
        )
    for note in run.notes:
        run.screen.say(note)


def describe_utilization(run: "Run") -> dict[str, str]:
    """That of the last steps, if it was measured."""
    return {} if run.flops is None or run.utilization is None else {run.flops.name: percent(run.utilization)}


def print_report(run: "Run", outcome: TrainingResult) -> None:
    """Print the results of a finished run, and what to do with them."""
    result, out_dir = run.result, run.out_dir
    losses = [loss for _, loss in result.val_losses]
    losses = [losses[0], losses[-1]] if len(losses) > 1 else losses
    rows = {
        "training loss": f"{result.loss:.4f}",
        "validation loss": " -> ".join(f"{loss:.4f}" for loss in losses),
        **run.method.objective.summary(result.val_metrics, [perplexity(loss) for loss in losses]),
        "exact answers": " -> ".join(f"{score:.1%}" for score in result.scores),
        "time": f"{duration(result.seconds)} for {result.steps:,} steps",
        "speed": f"{result.tokens / max(result.seconds, 1e-9):,.0f} tokens/s, {result.tokens:,} tokens",
        **describe_utilization(run),
        "peak memory": gigabytes(peak_memory(run.fabric.device)),
        **describe_results(outcome),
        "metrics": unbroken(out_dir / METRICS) + (f", {unbroken(out_dir / PLOT)}" if run.metrics.plotted else ""),
        "report": unbroken(run.reported or ""),
    }
    run.screen.table("Done", rows)
    for remark in run.method.objective.remarks(result.val_metrics):
        run.screen.say(remark)
    if commands := next_commands(run, outcome.folder):
        run.screen.say("\n  ".join(["Next:", *commands]))
    if run.method.remark:
        run.screen.say(run.method.remark)
    base = run.base_model.checkpoint.folder if run.base_model.checkpoint else PICO
    if is_adapter(outcome.folder) and base != PICO and repository_id(base) is None:
        run.screen.say(
            f"The adapter names its base by a path on this machine, {unbroken(base.resolve())}. Elsewhere, pass it "
            "with --base."
        )


def describe_results(outcome: TrainingResult) -> dict[str, str]:
    """The best and the last result."""
    final, best = unbroken(outcome.out_dir / "final"), outcome.best
    if best is None or best[0] == outcome.steps:
        return {"result": final}
    where, last = f"{best[1]:.4f} after step {best[0]:,}", outcome.val_losses[-1]
    if outcome.folder.name != "best":
        return {"result": final, "best": f"{where}, not saved; --train.save_best true saves it"}
    last_loss = f"{last[1]:.4f} " * (last[0] == outcome.steps)
    return {
        "best": f"{where}: {unbroken(outcome.folder)}",
        "last": f"{last_loss}after step {outcome.steps:,}: {final}",
    }


def next_commands(run: "Run", folder: Path) -> list[str]:
    """The commands that use a result, ready to be typed."""
    question, commands = None, []
    with spared("Cannot find an example question"):
        question = run.examples.question()
    for template in run.method.next_commands:
        command = template.format(folder=shlex.quote(str(folder)), prompt=quote(question or "..."))
        name = command.split()[1]
        if name == "evaluate" and not (len(run.dataset.val) and (folder / HYPERPARAMETERS).is_file()):
            continue  # it evaluates on the validation rows that the settings of the command line name
        missing = name in NEEDED and find_spec(NEEDED[name]) is None
        commands.append(command + f"  # needs {install_command(name)}" * missing)
    return commands


def quote(text: str) -> str:
    """A text as one word of a shell, in the quotes that leave it readable."""
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


def describe_devices(run: "Run") -> str:
    fabric, n_threads = run.fabric, torch.get_num_threads()
    n_nodes = getattr(fabric.strategy, "num_nodes", 1)
    machines = f" on {n_nodes} machines" if n_nodes > 1 else ""
    strategy = f" ({run.sharing})" if fabric.world_size > 1 else ""
    precision = f"{run.precision_name}, {run.quantize}" if run.quantize else run.precision_name
    precision += ", TF32" * uses_tf32(fabric.device, run.precision_name)
    threads = f"{n_threads} thread{'s' * (n_threads > 1)} each"
    return f"{fabric.world_size} x {fabric.device.type}{machines}{strategy}, {precision}, {threads}"


def describe_packs(rows: Rows) -> str:
    if not isinstance(rows, PackedRows):
        return ""
    longest = int(rows.lengths.max())
    full = float(rows.lengths.float().mean()) / longest
    return f"{len(rows):,} of at most {longest:,} tokens, {full:.1%} full"


def describe_schedule(plan: Plan, train: TrainArgs, rows: Rows) -> str:
    unit = "packs" if isinstance(rows, PackedRows) else "rows"
    step = f"of {train.global_batch_size} {unit} (about {plan.tokens_per_step:,.0f} tokens)"
    budget = [f"{plan.tokens:,} tokens"] if plan.tokens is not None else []
    budget += [f"{duration(plan.seconds)} of training"] if plan.seconds is not None else []
    limits = ([f"{plan.steps:,} steps"] if plan.steps is not None else []) + budget
    ending = f"{' or '.join(limits)}{', whichever comes first' if len(limits) > 1 else ''}"
    return f"{ending}{', steps' if budget else ''} {step}, micro-batch {train.micro_batch_size}"


def describe_learning_rate(peak: float, plan: Plan, train: TrainArgs, origin: str) -> str:
    rate = f"learning rate {peak:g}{f' ({origin})' * bool(origin)}"
    warmup = (
        f"{plan.warmup:,} warmup step{'s' * (plan.warmup != 1)}{' (at most a tenth of the run)' * plan.has_budget}, "
        if plan.warmup
        else ""
    )
    warmup = f"warmup over {plan.fraction:.0%} of the run, " if plan.fraction else warmup
    if train.lr_schedule == "constant":
        return f"{warmup}{rate}, constant"
    end = f"step {plan.decay:,}" if plan.decay is not None else "the end"
    return f"{warmup}{rate}, {train.lr_schedule} to {train.min_lr:g} at {end}"


def describe_rows(rows: TokenizedRows) -> str:
    if not len(rows):
        return "none"
    return f"{len(rows):,} rows, {int(rows.lengths.sum()):,} tokens, longest {int(rows.lengths.max()):,}"


def describe_counts(counts: Counts) -> str:
    """How many rows were read, and how many of them were not used as they are."""
    forms = ", ".join(f"{n:,} {form}" for form, n in counts.forms.items())
    changed = {
        "dropped because they are too long": counts.too_long,
        "invalid and skipped": counts.bad,
        "skipped because of their label or scores": counts.skipped,
        "dropped because both answers are the same": counts.identical,
    }
    more = "".join(f", {n:,} {what}" for what, n in changed.items() if n)
    skipped = f"{counts.no_targets:,} skipped" + " (no target tokens)" * bool(counts.no_targets)
    return f"{counts.rows:,} read ({forms}): {counts.truncated:,} truncated, {skipped}{more}"
