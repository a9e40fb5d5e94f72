"""The runs below a folder, as their files tell: settings, state, losses, and scores. Nothing is written, and files that
are damaged, half-written, or of others are passed over."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from litgpt.errors import UserError, require
from litgpt.storage.files import read_json, read_text, read_yaml
from litgpt.storage.outputs import CARD, is_locked
from litgpt.train.inbox import LOCK
from litgpt.train.metrics import LINE, METRICS, POINTS, figure_class, save_figure, thinned
from litgpt.train.resume.find import all_checkpoints, is_complete
from litgpt.train.resume.folder import HYPERPARAMETERS
from litgpt.train.resume.state import MICRO_BATCH, STATE, TrainingState, flat
from litgpt.train.run_lock import read_lock

State = Literal["running", "finished", "stopped", "failed"]
Points = list[tuple[int, float]]
LIGHTNING = f"logs/*/version_*/{METRICS}"  # where LitGPT's runs have their metrics
RESULTS = "evaluate/results.json"
HIDDEN = re.compile(r"\..*")  # folders in which there are no runs
OWN = re.compile(r"\..*|(damaged-)?step-\d+.*|final.*|best.*|crash|evaluate|logs")  # the same in the folder of a run
UNUSED = re.compile(
    r"(out_dir|logger_name|report|dry_run|log\..*|.*access_token)$"
)  # settings that do not change results
NAMED = 25  # runs in the legend of a plot
CARD_FACTS = ("base", "data", "training rows", "validation rows", "prompt style", "loss on", "made with")
FACTS = (*CARD_FACTS[:-1], "base files", "row hashes", "row order")  # about data
OF_MACHINE = ("torch", "threads", "the number of devices", "the strategy", MICRO_BATCH)  # in a checkpoint
FACT = re.compile(rf"^\| ({'|'.join(CARD_FACTS)}) \| (.*) \|$", re.MULTILINE)
memory: dict[Path, tuple[tuple[int, int], Any]] = {}  # what `once` read


@dataclass(frozen=True)
class Curves:
    """What a metrics file tells. `train` and `val` are pairs of a step and a loss."""

    train: Points
    val: Points
    reward_accuracy: Optional[float]  # of the last validation, for preferences
    steps: int
    tokens: Optional[int]
    seconds: Optional[float]
    peak_memory: Optional[int]


@dataclass(frozen=True)
class RecordedRun:
    """A run as its folder tells. `scores` are those of `litgpt evaluate`, by task and metric."""

    folder: Path
    state: State
    settings: dict[str, Any]
    curves: Curves
    scores: dict[str, float]

    @property
    def best(self) -> Optional[tuple[int, float]]:
        """The step and the loss of the best validation after the first step."""
        pairs = [(step, loss) for step, loss in self.curves.val if step and math.isfinite(loss)]
        return min(pairs, key=lambda pair: pair[1], default=None)

    def fields(self) -> dict[str, Any]:
        """The results as numbers: losses in nats per token, seconds, and bytes."""
        val, (step, loss) = self.curves.val, self.best or (None, None)
        return {
            "val_loss_start": val[0][1] if val and val[0][0] == 0 else None,
            "val_loss_best": loss,
            "val_loss_best_step": step,
            "val_loss_last": val[-1][1] if val and val[-1][0] else None,
            **{name: value for name, value in vars(self.curves).items() if name not in ("train", "val")},
        }


def find_runs(folders: Iterable[Path]) -> tuple[list[RecordedRun], list[str]]:
    """The runs below some folders, best validation loss first, and what could not be read. Links to folders are not
    followed."""
    found, wrong = dict[str, RecordedRun](), list[str]()
    for folder in folders:
        for place, names, _ in os.walk(folder, onerror=lambda e: wrong.append(f"{e.filename}: {e.strerror}")):
            try:
                run = read_run(Path(place))
            except OSError as e:
                run = None
                wrong.append(f"{e.filename}: {e.strerror}")
            if run is not None:
                found.setdefault(os.path.realpath(place), run)
            names[:] = sorted(name for name in names if not (OWN if run else HIDDEN).fullmatch(name))
    return sorted(found.values(), key=lambda run: run.best[1] if run.best else math.inf), wrong


def find_run(folder: Path) -> RecordedRun:
    """The run in a folder, or the one that a result belongs to. Raises `UserError` if there is none."""
    for place in (folder, folder.absolute().parent):
        if (run := read_run(place)) is not None:
            return run
    raise UserError(f"{folder} is not the folder of a run: it has no {METRICS}. To list runs: litgpt runs")


def read_run(folder: Path) -> Optional[RecordedRun]:
    """The run in a folder; None if there is none."""
    files = [folder / METRICS, *sorted(folder.glob(LIGHTNING), key=lambda path: path.stat().st_mtime, reverse=True)]
    curves = next((found for file in files if (found := once(read_curves, file)) is not None), None)
    if curves is None:
        return None
    recorded = [place / HYPERPARAMETERS for place in (folder, folder / "final", *sorted(folder.glob("step-*")))]
    settings: dict[str, Any] = next((found for file in recorded if (found := once(read_settings, file))), {})
    return RecordedRun(folder, state_of(folder), settings, curves, scores(folder))


def state_of(folder: Path) -> State:
    return "running" if is_locked(folder / LOCK) else saved_state(folder)


def saved_state(folder: Path) -> State:
    """The state of a run that does not run."""
    saved = all_checkpoints(folder)
    if is_complete(folder, next(iter(saved), None)):
        return "finished"
    return "stopped" if any((path / STATE).is_file() for path in saved) else "failed"


def once(read: Callable[[Path], Any], file: Path) -> Any:
    """What `read` makes of a file, from memory while the file stays as it is. None without a file."""
    if not file.is_file():
        return None
    stamp = file.stat().st_mtime_ns, file.stat().st_size
    if memory.get(file, (None, None))[0] != stamp:
        memory[file] = stamp, read(file)
    return memory[file][1]


def read_curves(file: Path) -> Optional[Curves]:
    """The curves in a metrics file of litgpt, or of LitGPT, which counts micro-batches as steps. None for others."""
    with open(file, newline="", encoding="utf-8", errors="replace") as f:
        at = {name: i for i, name in enumerate(f.readline(LINE).strip().split(","))}
        if "step" not in at or not {"loss", "val_loss"} & {*at}:
            return None
        train, val, i_step, i_memory = Points(), Points(), at["step"], at.get("peak_memory")
        columns = [(at[name], points) for name, points in (("loss", train), ("val_loss", val)) if name in at]
        tokens = "total_tokens" if "total_tokens" in at else "tokens"
        kept = {at[name]: name for name in (tokens, "seconds", "val_rewards/accuracies") if name in at}
        last, peaks = dict[str, str](), set[str]()
        for line in iter(lambda: f.readline(LINE), ""):
            values = line.rstrip().split(",")
            if len(values) != len(at) or line[-1] != "\n" or len(values[i_step]) > 9:  # half-written, or no step
                continue
            try:
                for i, points in columns:
                    if values[i]:
                        points.append((int(values[i_step]), float(values[i])))
            except ValueError:
                continue
            for i, name in kept.items():
                last[name] = values[i] or last.get(name, "")
            if i_memory is not None:
                peaks.add(values[i_memory])
    found = {name: number(text) for name, text in last.items()}
    n_tokens, peak = found.get(tokens), max(map(number, peaks), default=0, key=lambda n: n or 0)
    return Curves(
        train,
        val,
        reward_accuracy=found.get("val_rewards/accuracies"),
        steps=max((step for step, _ in (*train[-1:], *val[-1:])), default=0),
        tokens=None if n_tokens is None else int(n_tokens),
        seconds=found.get("seconds"),
        peak_memory=int(peak) if peak else None,
    )


def number(text: str) -> Optional[float]:
    """A finite number; None for other text."""
    with suppress(ValueError):
        return value if math.isfinite(value := float(text)) else None
    return None


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of a run that can change its result or speed, under the names of their flags, with its method; empty
    if the file is damaged."""
    try:
        found = flat(read_yaml(file))
    except (UserError, AttributeError):
        return {}
    named = {}
    for name, value in ((name, value) for name, value in found.items() if not UNUSED.match(name)):
        if name.endswith(".class_path"):
            name, value = name.removesuffix(".class_path"), str(value).rpartition(".")[2]
        named[name.replace(".init_args.", ".")] = value
    methods = {"lora_r": "lora", "adapter_prompt_length": "adapter", "initial_checkpoint_dir": "pretrain"}
    method = next((method for name, method in methods.items() if name in named), "full")
    return {"method": method, **named} if named else {}


def scores(folder: Path) -> dict[str, float]:
    """What `litgpt evaluate` measured, by task and metric, behind the name of a result other than `final/`."""
    files = [folder / RESULTS, *sorted(folder.glob(f"*/{RESULTS}"))]
    found: dict[str, float] = {}
    for file in files:
        result = file.parent.parent
        before = "" if result in (folder, folder / "final") else f"{result.name}/"
        found |= {f"{before}{name}": value for name, value in (once(read_scores, file) or {}).items()}
    return found


def read_scores(file: Path) -> dict[str, float]:
    try:
        tasks = read_json(file)["results"]
        pairs = [(task, name, value) for task, values in tasks.items() for name, value in values.items()]
    except (UserError, AttributeError, LookupError, TypeError):
        return {}
    return {
        f"{task} {name.removesuffix(',none')}": float(value)
        for task, name, value in pairs
        if isinstance(value, (int, float)) and math.isfinite(value) and "," in name and "_stderr" not in name
    }


def differing(runs: Iterable[RecordedRun]) -> list[str]:
    """The settings in which runs differ."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            values.setdefault(name, set()).add(json.dumps(value))
    return [name for name, different in values.items() if len(different) > 1]


def facts(run: RecordedRun) -> tuple[dict[str, str], dict[str, str]]:
    """What a run records about its data, and about versions and the machine: in its model card, in `run.lock`, and in
    its newest checkpoint."""
    found: dict[str, str] = {}
    for folder in (run.folder / "best", run.folder / "final"):
        with suppress(UserError):
            card: dict[str, list[str]] = {}
            for name, text in FACT.findall(read_text(folder / CARD)):
                card.setdefault(name, []).append(text)
            found |= {name: "; ".join(texts) for name, texts in card.items()}
        with suppress(UserError):
            found |= lock_facts(read_lock(folder) or {})
    for checkpoint in all_checkpoints(run.folder)[:1]:
        with suppress(UserError, OSError):
            for name, value in TrainingState.read(checkpoint, mmap=True).settings.items():
                if "checksum" in name and isinstance(value, list) and len(value) == 3:
                    found[name[4:].partition(" (")[0]] = f"{value[0]:,} rows, {value[1]:,} tokens, checksum {value[2]}"
                elif name in OF_MACHINE:
                    found[name.removeprefix("the ")] = str(value)
    if "made with" in found:
        found.setdefault("litgpt", found.pop("made with").removeprefix("litgpt "))
    data = {name: text for name, text in found.items() if name in FACTS}
    return data, {name: text for name, text in found.items() if name not in (*FACTS, "made with")}


def lock_facts(lock: dict[str, Any]) -> dict[str, str]:
    texts = {"source code" if name == "code" else name: text for name, text in lock.get("versions", {}).items()}
    texts |= {name: str(value) for name, value in lock.get("machine", {}).items()}
    for name, value in (
        ("base files", lock.get("model")),
        ("row hashes", lock.get("rows")),
        ("row order", lock.get("order")),
    ):
        if value:
            texts[name] = (
                hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12] if isinstance(value, dict) else value[:12]
            )
    return texts


def plot_runs(runs: Iterable[RecordedRun], names: Iterable[str], image: Path) -> None:
    """Plot the losses of runs over each other: of training as thin lines, of validation with markers. Raises
    `UserError` if matplotlib is not installed."""
    make_figure: Any = figure_class() or require("matplotlib", "plot")
    labels = [*names]
    figure = make_figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for i, (run, name) in enumerate(zip(runs, labels)):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
        train, val = (
            [pair for pair in points if math.isfinite(pair[1])] for points in (run.curves.train, run.curves.val)
        )
        shown = " " + name[-40:].replace("$", r"\$")  # a name that begins with _ would be left out
        label = shown if i < NAMED else f" {len(labels) - NAMED} more" if i == NAMED else None
        if train:
            axes.plot(*zip(*thinned(train, POINTS)), **style, linewidth=0.6, alpha=0.6, label=None if val else label)
        if val:
            axes.plot(*zip(*thinned(val, POINTS)), **style, marker="o", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="loss: training (thin) and validation (markers)")
    axes.grid(alpha=0.3)
    if axes.lines:
        figure.legend(loc="outside right upper", fontsize="small")
    save_figure(figure, image)
