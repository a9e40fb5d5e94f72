"""Sweeps: one finetune for each combination of options, in one process, so that packages are imported once, rows are
tokenized once, and the weights that are not trained are read once."""

import itertools
import json
import math
import random
import re
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import yaml
from rich.console import Console
from rich.table import Table

from litgpt.checkpoint.folder import KeptWeights, kept_weights
from litgpt.cli.commands import SWEEP, spoken
from litgpt.errors import UserError, reason
from litgpt.storage.files import is_there, read_json
from litgpt.storage.outputs import exclusive, write_single
from litgpt.train.args import halt_at
from litgpt.train.loop import PAUSED
from litgpt.train.result import TrainingResult
from litgpt.train.resume.folder import HYPERPARAMETERS
from litgpt.train.signals import Stopped

ALIASES = {"lr": "optimizer.lr", "epochs": "train.epochs"}
RECORD, BEST, LOG = "sweep.json", "best.yaml", "log.txt"
RUNGS = (0.25, 0.5, 1.0)  # with a budget: fractions of a run, after each of which the worse half of the trials stops
UNITS = {"s": 1, "m": 60, "h": 3600}
Run = Callable[[list[str]], Optional[TrainingResult]]


@dataclass
class Trial:
    """One combination of options.

    Args:
        number: From 1 on.
        options: The values as words, by the names of the options.
        state: waiting, running, stopped (by the budget), failed, or finished.
        best: The lowest validation loss after the first step, and its step. Without validation, the last training loss.
        last: The last of these losses.
        seconds: Of training.
        error: Why it failed.
    """

    number: int
    options: dict[str, str]
    state: str = "waiting"
    best: Optional[tuple[int, float]] = None
    last: Optional[float] = None
    seconds: float = 0.0
    error: str = ""

    @property
    def folder(self) -> str:
        values = "-".join(f"{name.rpartition('.')[2]}={value}" for name, value in self.options.items())
        return f"{self.number:03d}-{re.sub(r'[^A-Za-z0-9=._+-]+', '_', values)[:80]}"

    @property
    def words(self) -> list[str]:
        return [word for name, value in self.options.items() for word in (f"--{name}", value)]

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts trials by their best loss. Trials without one come last."""
        return (self.best is None or self.state == "failed", self.best[1] if self.best else math.inf)

    def read(self, out_dir: Path) -> None:
        """Take the losses from the folder of the run, as far as it is."""
        with suppress(OSError, UserError, ValueError):
            result = TrainingResult.read(out_dir)
            losses = [pair for pair in result.val_losses if pair[0]] or result.losses[-1:]
            losses = [(step, loss) for step, loss in losses if math.isfinite(loss)]
            if losses:
                self.best, self.last = min(losses, key=lambda pair: pair[1]), losses[-1][1]
            self.seconds = result.seconds


@dataclass
class Sweep:
    """A sweep over the words of a command.

    Args:
        command: The command, such as finetune_lora.
        words: Its words without those of the sweep.
        out_dir: The folder with a folder for each trial.
        run: Runs the command with given words.
    """

    command: str
    words: list[str]
    out_dir: Path
    run: Run
    trials: list[Trial]
    budget: Optional[float] = None
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))

    def __call__(self) -> None:
        names = ", ".join(self.trials[0].options)
        self.say(f"litgpt {spoken(self.command)}: {len(self.trials)} trials over {names} in {self.out_dir}")
        with exclusive(self.out_dir / RECORD):
            self.check_record()
            token = kept_weights.set(KeptWeights())
            try:
                self.train()
            finally:
                kept_weights.reset(token)
            self.finish()

    def train(self) -> None:
        """Run all trials; with a budget, all of them a part of the way, and then the better half of them further."""
        began, waiting = time.monotonic(), self.trials
        for rung in RUNGS if self.budget is not None else (1.0,):
            for trial in waiting:
                if self.budget is not None and time.monotonic() - began > self.budget:
                    self.say("The budget is used up.")
                    return
                self.go(trial, rung)
            alive = sorted((t for t in waiting if t.state != "failed"), key=lambda t: t.rank)
            waiting = alive[: math.ceil(len(alive) / 2)]

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def check_record(self) -> None:
        """Raise `UserError` if the folder has another sweep."""
        file, record = self.out_dir / RECORD, {"words": self.words, "trials": [t.options for t in self.trials]}
        if is_there(file) and read_json(file) != record:
            raise UserError(f"{self.out_dir} has another sweep. Choose another --out_dir.")
        write_single(file, json.dumps(record, indent=1) + "\n")

    def go(self, trial: Trial, rung: float) -> None:
        """Run a trial up to a fraction of its steps, or continue it."""
        out_dir = self.out_dir / trial.folder
        out_dir.mkdir(parents=True, exist_ok=True)
        shown = " ".join(trial.words)
        began, code = time.monotonic(), 0
        halt_at.set(rung if rung < 1 else None)
        with open(out_dir / LOG, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                self.run([*self.words, *trial.words, "--out_dir", str(out_dir), "--resume", "auto"])
                trial.state = "finished"
            except Stopped as e:
                trial.state, code = "stopped", int(e.code or 0)
            except (Exception, SystemExit) as e:  # a trial that fails is a row of the table
                trial.state, trial.error = "failed", reason(e) if isinstance(e, Exception) else "see its log"
                print(trial.error, file=log)
            finally:
                halt_at.set(None)
        trial.read(out_dir)
        loss = f"loss {trial.best[1]:.4f}" if trial.best else "no loss"
        took = f"{time.monotonic() - began:.0f} s"
        self.say(f"{trial.number:3d} of {len(self.trials)}  {shown}: {trial.error or f'{loss}, {took}'}")
        if trial.state == "stopped" and (rung == 1 or code != PAUSED):
            self.say(f"Stopped. The same command continues the sweep in {self.out_dir}.")
            raise Stopped(code)

    def finish(self) -> None:
        """Print the table, and how to repeat the best trial; write its settings."""
        ranked = sorted(self.trials, key=lambda trial: trial.rank)
        self.console.print(table(ranked))
        if ranked[0].rank[0]:
            raise UserError(f"All trials failed. The first one: {self.trials[0].error or 'see its log.txt'}")
        winner = next((trial for trial in ranked if trial.state == "finished"), ranked[0])
        folder, command = self.out_dir / winner.folder, f"litgpt {spoken(self.command)}"
        settings = yaml.safe_load((folder / HYPERPARAMETERS).read_text(encoding="utf-8"))
        write_single(self.out_dir / BEST, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        if winner.state == "finished":
            self.say(f"\nBest:   {folder / 'final'}")
        else:
            self.say(f"\nBest:   {folder}, which is not finished")
        self.say(f"Again:  {command} {shlex.join([*self.words, *winner.words])}")
        self.say(f"        {command} --config {self.out_dir / BEST} --out_dir out/best")


def table(trials: Sequence[Trial]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in trials[0].options:
        made.add_column(name.removeprefix("optimizer."))
    for name in ("best", "at step", "last", "seconds"):
        made.add_column(name, justify="right")
    made.add_column("state")
    for trial in trials:
        best = (f"{trial.best[1]:.4f}", f"{trial.best[0]:,}") if trial.best else ("-", "-")
        last = f"{trial.last:.4f}" if trial.last is not None else "-"
        made.add_row(*trial.options.values(), *best, last, f"{trial.seconds:.1f}", trial.error or trial.state)
    return made


# the words of a sweep


def make_sweep(command: str, words: list[str], run: Run) -> Sweep:
    """The sweep that the words of a command ask for. Raises `UserError` if they do not say one."""
    rest, found = [], {flag: list[str]() for flag in SWEEP}
    out_dir = Path("out", "sweep")
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag in SWEEP or flag == "--out_dir":
            value = value if equals else next(waiting, "")
            if not value or value.startswith("--"):
                raise UserError(f"{flag} needs a value.")
            if flag == "--out_dir":
                out_dir = Path(value)
            else:
                found[flag].append(value)
        else:
            rest.append(word)
    if any(word.startswith("--print_config") for word in rest):
        raise UserError("--print_config shows the settings of one run. Remove --sweep.")
    if any(word.partition("=")[0] in ("--resume", "--overwrite") for word in rest):
        raise UserError("The same command continues a --sweep by itself. Remove --resume and --overwrite.")
    spaces = dict(map(read_space, found["--sweep"]))
    if not spaces:
        raise UserError("--sweep names an option and its values, such as --sweep optimizer.lr=1e-4,3e-4.")
    n_random = found["--sweep_random"][-1] if found["--sweep_random"] else None
    options = random_trials(spaces, n_random) if n_random else grid(spaces)
    budget = seconds_of(found["--sweep_budget"][-1]) if found["--sweep_budget"] else None
    return Sweep(command, rest, out_dir, run, [Trial(i, o) for i, o in enumerate(options, 1)], budget)


def read_space(text: str) -> tuple[str, str]:
    name, equals, values = text.removeprefix("--").partition("=")
    if not equals or not name or not values:
        raise UserError(f"--sweep {text}: expected NAME=VALUE,VALUE, NAME=LOW:HIGH, or NAME=log:LOW:HIGH.")
    return ALIASES.get(name, name), values


def grid(spaces: dict[str, str]) -> list[dict[str, str]]:
    """All combinations."""
    for name, values in spaces.items():
        if bounds(values) is not None:
            raise UserError(f"--sweep {name}={values} is a range. Pass --sweep_random N for N draws from it.")
    return [dict(zip(spaces, values)) for values in itertools.product(*(v.split(",") for v in spaces.values()))]


def random_trials(spaces: dict[str, str], number: str) -> list[dict[str, str]]:
    """Random combinations, always the same ones for the same words."""
    if not number.isdigit() or not int(number):
        raise UserError(f"--sweep_random {number} must be a number above 0.")
    draw = random.Random(json.dumps([spaces, number]))
    return [{name: drawn(values, draw) for name, values in spaces.items()} for _ in range(int(number))]


def drawn(values: str, draw: random.Random) -> str:
    limits = bounds(values)
    if limits is None:
        return draw.choice(values.split(","))
    is_log, low, high = limits
    if is_log:
        return f"{math.exp(draw.uniform(math.log(low), math.log(high))):.4g}"
    whole = all(re.fullmatch(r"-?\d+", part) for part in values.split(":"))
    return str(draw.randint(int(low), int(high))) if whole else f"{draw.uniform(low, high):.4g}"


def bounds(values: str) -> Optional[tuple[bool, float, float]]:
    """Whether a range is logarithmic, and its ends; None for a list of values."""
    match = re.fullmatch(r"(log:)?([^:,]+):([^:,]+)", values)
    if match is None:
        return None
    try:
        low, high = float(match[2]), float(match[3])
    except ValueError:
        return None
    if not low < high or (match[1] and low <= 0):
        raise UserError(f"--sweep: {values} is not a range from a lower to a higher number.")
    return bool(match[1]), low, high


def seconds_of(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise UserError(f"--sweep_budget {text} is not a time such as 90s, 15m, or 2h.")
    return float(match[1]) * UNITS[match[2] or "s"]
