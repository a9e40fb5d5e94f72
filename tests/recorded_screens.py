"""What a run shows: in terminals of several widths, a dumb one, a pipe, and a notebook.

Losses, times, and the machine are made up; everything else is a real run of `litgpt finetune lora`. `python -m
tests.recorded_screens` writes the files in `screens/` anew.
"""

import builtins
import io
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional

import pytest
import torch

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.train import loop, metrics, progress, report
from litgpt.train.flops import FlopCounter
from litgpt.train.loss import LossModel

FOLDER = Path(__file__).with_name("screens")
SECONDS_PER_STEP, MIDDLE = 0.8, 100
OPTIONS = {
    "--data": "JSON",
    "--data.json_path": "rows.json",
    "--data.val_split_fraction": 0.1,
    "--out_dir": "out/sums",
    "--train.epochs": 32,
    "--train.global_batch_size": 12,
    "--train.micro_batch_size": 12,
    "--train.lr_warmup_steps": 10,
    "--train.save_interval": "null",
    "--train.save_best": "true",
    "--eval.interval": 60,
    "--eval.evaluate_example": 1,
    "--eval.max_new_tokens": 4,
    "--precision": "32-true",
    "--accelerator": "cpu",
}
CODE = re.compile(r"\x1b\[([0-9;?]*)([a-zA-Z])|([^\x1b])|\x1b", re.DOTALL)


def emulate(text: str) -> list[str]:
    """The lines of a terminal after it was sent a text. Lines never wrap."""
    lines, row, column = [""], 0, 0
    for number, code, character in CODE.findall(text):
        if code == "K":
            lines[row] = ""
        elif code == "A":
            row -= int(number or 1)
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif character:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


class Stream(io.StringIO):
    """A terminal or a pipe."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def shown(self) -> list[str]:
        return emulate(self.getvalue())


@dataclass
class Notebook:
    """A notebook, as far as a run uses one."""

    outputs: dict[int, str] = field(default_factory=dict)
    updates: int = 0

    def display(self, shown: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw and display_id and set(shown) == {"text/plain"}
        number = len(self.outputs)
        self.outputs[number] = shown["text/plain"]

        def update(shown: dict[str, str], raw: bool) -> None:
            self.outputs[number], self.updates = shown["text/plain"], self.updates + 1

        return SimpleNamespace(update=update)

    def shown(self) -> list[str]:
        return "\n".join(self.outputs.values()).splitlines()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class ZMQInteractiveShell:  # the name by which programs recognize a notebook
            pass

        module = ModuleType("IPython.display")
        module.display = self.display  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", module)
        monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)


KINDS: dict[str, dict[str, str]] = {  # and their environment; no terminal without one
    "terminal-60": {"COLUMNS": "60"},
    "terminal-80": {"COLUMNS": "80"},
    "terminal-200": {"COLUMNS": "200"},
    "dumb": {"COLUMNS": "80", "TERM": "dumb"},
    "pipe": {},
    "notebook": {},
}


def set_terminal(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Stream:
    """Make the standard output a terminal, or a pipe if the environment is empty."""
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    stream = Stream(bool(environment))
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


class Clock:
    """Time passes in steps. The loop looks at the clock at the beginning and at the end of each."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def tick(self) -> float:
        self.calls += 1
        self.now += SECONDS_PER_STEP * (self.calls % 2 == 0)
        return self.now


def make_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what differs between machines."""
    clock, steps = Clock(), [0]

    def forward(self: LossModel, batch: Any) -> torch.Tensor:
        zero = sum(p.sum() for p in self.parameters() if p.requires_grad) * 0
        steps[0] += self.training
        loss = 0.31 + 4.6 / (1 + steps[0] / 6)
        if not self.training:
            loss += 0.05 + 2e-3 * max(0, steps[0] - 120)
        return zero + loss * batch.n_target_tokens

    monkeypatch.setattr(LossModel, "forward", forward)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=clock.tick))
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(FlopCounter, "of", lambda *args: SimpleNamespace(name="MFU", share=lambda *args: 0.24))
    for module in (loop, report):
        monkeypatch.setattr(module, "peak_memory", lambda device: 480_000_000)
    monkeypatch.setattr(metrics, "plot", lambda *args: True)
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "lm_eval" else name)
    monkeypatch.setattr(report, "describe_devices", lambda run: "1 x cpu, 32-true, 2 threads each")


def write_rows(file: Path) -> None:
    words = "one two three four five six seven eight nine ten".split()
    rows = [
        {"prompt": f"What is {a} plus {b}?", "completion": f"{words[i]} and {words[j]}."}
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")


def record(kind: str, folder: Path) -> str:
    """What one kind of screen shows in the middle and at the end. The run is in this folder."""
    environment = KINDS[kind]
    screen: Any
    middle: Optional[list[str]] = None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("LITGPT_CACHE", str(folder / "cache"))
        write_rows(folder / "rows.json")
        shutil.copytree(PICO, folder / "checkpoints" / "me" / "pico")
        screen = set_terminal(monkeypatch, environment)
        if kind == "notebook":
            screen = Notebook()
            screen.install(monkeypatch)
        make_up(monkeypatch)
        original = loop.Trainer.log_step

        def log_step(self: loop.Trainer, *args: Any) -> None:
            nonlocal middle
            original(self, *args)
            if self.result.steps == MIDDLE:
                middle = screen.shown()

        monkeypatch.setattr(loop.Trainer, "log_step", log_step)
        main(["finetune", "lora", "me/pico", *(str(word) for pair in OPTIONS.items() for word in pair)])
    assert middle is not None
    return "\n".join([f"----- at step {MIDDLE}", *middle, "----- at the end", *screen.shown()]).rstrip("\n") + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as place:
            (FOLDER / f"{kind}.txt").write_text(record(kind, Path(place)), encoding="utf-8")
