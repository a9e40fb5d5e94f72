"""What the model card of a result says about its training."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt import __version__
from litgpt.checkpoint.hub import PICO, display_name, repository_id
from litgpt.checkpoint.model_card import ADAPTER, Facts, write_card
from litgpt.data.sources import RowSource
from litgpt.errors import UserError
from litgpt.storage.files import is_there, read_json
from litgpt.train.faults import spared
from litgpt.train.objectives import Preference
from litgpt.train.report import describe_learning_rate, describe_rows, describe_schedule

if TYPE_CHECKING:
    from litgpt.train.run import Run

MOST_FILES, MOST_MODULES, HASH = 12, 8, 12  # that are listed; digits of a hash


def write_run_card(run: "Run", folder: Path, name: str) -> None:
    """Write the card of a result of a run, which is complete but for it. `name` is that of its folder in the output
    folder. What goes wrong is reported, and does not end the run."""
    with spared("Cannot write the model card"):
        base = run.base_model.checkpoint.folder if run.base_model.checkpoint else None
        facts = Facts.of_base(base) if base is not None else Facts()
        facts.training = table(run_facts(run, folder))
        facts.data_sets = sorted({found for source, _ in run.dataset.all_sources if (found := hub_id(source))})
        write_card(folder, display_name(run.out_dir / name), facts, base)


def run_facts(run: "Run", folder: Path) -> list[tuple[str, str]]:
    dataset, result, objective = run.dataset, run.result, run.method.objective
    validated = [loss for _, loss in result.val_losses]
    losses = [validated[0], validated[-1]] if len(validated) > 1 else validated
    sources = [*dataset.sources, *(dataset.val_sources or [])]
    files = [describe_source(source, counts.rows) for source, counts in sources[:MOST_FILES]]
    files += [f"{len(sources) - MOST_FILES} more files"] if len(sources) > MOST_FILES else []
    return [
        ("base", base_name(run)),
        ("method", f"{run.method.name}{describe_adapter(folder)}"),
        *(
            [("preference", f"{objective.name}, beta {objective.args.beta:g}")]
            if isinstance(objective, Preference)
            else []
        ),
        *(("data", text) for text in files),
        ("training rows", describe_rows(dataset.train)),
        ("validation rows", describe_rows(dataset.val)),
        ("prompt style", "none: plain text" if dataset.plain_text else dataset.style.name),
        ("loss on", "answers" if dataset.mask_prompt else "prompts and answers"),
        ("schedule", describe_schedule(run.plan, run.train, run.train_rows)),
        (
            "optimizer",
            f"{type(run.saver.optimizer).__name__}, "
            f"{describe_learning_rate(run.peak_lr, run.plan, run.train, run.rate_origin)}",
        ),
        ("precision", run.precision_name + (f", base in {run.quantize}" if run.quantize else "")),
        ("seed", str(run.seed)),
        ("steps", f"{result.steps:,}, {result.tokens:,} tokens"),
        ("training loss", f"{result.loss:.4f} in the last step"),
        *([("validation loss", " before, ".join(f"{loss:.4f}" for loss in losses) + " after")] if losses else []),
        ("made with", f"litgpt {__version__}"),
    ]


def base_name(run: "Run") -> str:
    checkpoint = run.base_model.checkpoint
    if checkpoint is None:
        return f"random weights ({run.base_model.config.model_type})"
    name = repository_id(checkpoint.folder)
    place = "in the litgpt package" if checkpoint.folder == PICO else "a folder on the machine of the run"
    return name or f"{display_name(checkpoint.folder)}, {place}"


def describe_adapter(folder: Path) -> str:
    """The settings of a LoRA."""
    if not is_there(folder / ADAPTER):
        return ""
    fields = read_json(folder / ADAPTER)
    if fields.get("peft_type") != "LORA":
        return ""
    modules = fields["target_modules"]
    shown = ", ".join(modules[:MOST_MODULES]) + (", ..." if len(modules) > MOST_MODULES else "")
    kind = " with DoRA" if fields.get("use_dora") else ""
    return f": rank {fields['r']}, alpha {fields['lora_alpha']}{kind}, on {shown or 'experts'}"


def hub_id(source: RowSource) -> str:
    """The data set on the hub that rows are read from; empty if they are not."""
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(:.*)?", str(source.path))
    return found[1] if found else ""


def describe_source(source: RowSource, n_rows: int) -> str:
    """The name of a file without its folder, its rows, and a hash of it."""
    name = str(source.path).removeprefix("hf:") if hub_id(source) else Path(str(source.path)).name
    try:
        digest = source.fingerprint()[0][:HASH]
    except (OSError, UserError):  # the file may be gone
        digest = "unknown"
    return f"`{name}`: {n_rows:,} row{'s' * (n_rows != 1)}, hash {digest}"


def table(rows: list[tuple[str, str]]) -> list[str]:
    """A Markdown table of two columns without a heading."""
    cells = [(key, " ".join(value.split()).replace("|", "\\|")) for key, value in rows]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)]
