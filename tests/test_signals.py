"""SIGINT, SIGTERM and SIGUSR1 end a run with what it learned saved, and the line that it prints goes on."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.data.data_module import DataModule
from litgpt.train import loop
from litgpt.train.args import run_settings, run_words
from litgpt.train.examples import Examples
from litgpt.train.loss import LossModel
from litgpt.train.resume.find import again
from litgpt.train.resume.save import Saver
from litgpt.train.resume.state import checkpoints, damage
from tests.runs import go, lines, same, start

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}


def strike(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, number: int, when: Callable[..., bool]) -> None:
    """Send this process a signal when a function is called, once its arguments are right."""
    original, sent = getattr(place, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not sent and when(*args):
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, wrapped)


def counted(n: int) -> Callable[..., bool]:
    """Right at the n-th call."""
    calls: list[int] = []
    return lambda *args: calls.append(1) or len(calls) == n


def resumed(command: str) -> int:
    """Run the line that a run printed; its exit code."""
    program, *rest = shlex.split(command)
    assert program == "litgpt"
    try:
        main(rest)
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
def test_in_a_step(number, base, whole, rows_file, tmp_path, monkeypatch, capfd):
    strike(monkeypatch, loop, "clip", number, counted(6))
    before = signal.getsignal(number)
    assert go("lora", base, rows_file, tmp_path / "out") == CODES[number]
    assert signal.getsignal(number) is before
    printed, error = capfd.readouterr()
    assert f"litgpt: {number.name}: saving after this step." in error
    assert damage(tmp_path / "out" / "step-000006") is None, "the step was not finished"
    command = re.search(r"Saved (\S+)\. To resume: (litgpt .*)", printed)
    assert command and command[1] == str(tmp_path / "out" / "step-000006")
    assert resumed(command[2]) == 0
    same(tmp_path / "out", whole("lora"))


def test_in_a_validation(base, whole, rows_file, tmp_path, monkeypatch, capfd):
    """The validation after step 4, where a checkpoint is due as well: it is broken off, and made up for later."""
    flags = ["--train.save_interval", 4, "--train.micro_batch_size", 2]
    calls: list[int] = []
    original = LossModel.forward

    def counting(self, batch):
        if not self.training and (tmp_path / "out" / "metrics.csv").read_text().count("\n") > 5:
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(LossModel, "forward", counting)
        assert go("lora", base, rows_file, tmp_path / "out", *flags) == 143
    assert len(calls) == 1, "the validation went on"
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["step-000004"]
    assert sum(bool(line["val_loss"]) for line in lines(tmp_path / "out")) == 1
    # killed after the validation was made up for, and before the next checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(loop, "clip", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go("lora", base, rows_file, tmp_path / "out", *flags, "--resume", "true")
    assert sum(bool(line["val_loss"]) for line in lines(tmp_path / "out")) == 2
    assert go("lora", base, rows_file, tmp_path / "out", *flags, "--resume", "true") == 0
    assert go("lora", base, rows_file, tmp_path / "whole", *flags) == 0
    same(tmp_path / "out", tmp_path / "whole")


def test_in_the_last_validation(base, whole, rows_file, tmp_path, monkeypatch):
    strike(monkeypatch, loop.Trainer, "validate", signal.SIGUSR1, counted(4))
    assert go("lora", base, rows_file, tmp_path / "out") == 75
    assert checkpoints(tmp_path / "out")[0].name == "step-000012"
    assert not (tmp_path / "out" / "final").exists()
    assert go("lora", base, rows_file, tmp_path / "out", "--resume", "true") == 0
    same(tmp_path / "out", whole("lora"))


BEFORE = {
    "tokenizing": (DataModule, "load"),
    "the first example": (Examples, "show"),
    "the first validation": (loop.Trainer, "validate"),
}


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
@pytest.mark.parametrize("where", BEFORE)
def test_before_the_first_step(where, number, base, whole, rows_file, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patched:
        strike(patched, *BEFORE[where], number, counted(1))
        if where != "the first validation":
            patched.setattr(loop.Trainer, "fit", lambda self: pytest.fail("the run did not end at once"))
        assert go("lora", base, rows_file, tmp_path / "out") == CODES[number]
    command = re.search(r"No checkpoint was saved\. To resume: (litgpt .*)", capfd.readouterr().out)
    assert command and not checkpoints(tmp_path / "out")
    if number == signal.SIGUSR1:
        assert resumed(command[1]) == 0
        same(tmp_path / "out", whole("lora"))


@pytest.mark.parametrize("where", ["final", "example"])
def test_at_the_end(where, base, whole, rows_file, tmp_path, monkeypatch, capfd):
    """While the result is written it is finished first; afterwards nothing is lost, whenever it ends."""
    if where == "final":
        strike(monkeypatch, Saver, "final", signal.SIGTERM, counted(1))
    else:
        strike(monkeypatch, Examples, "show", signal.SIGTERM, lambda self, when: when == "after")
    assert go("lora", base, rows_file, tmp_path / "out") == (0 if where == "final" else 143)
    assert where == "final" or f"The result is {tmp_path / 'out' / 'final'}." in capfd.readouterr().out
    same(tmp_path / "out", whole("lora"))
    assert go("lora", base, rows_file, tmp_path / "out", "--resume", "true") == 0


def test_twice_sigint(base, whole, rows_file, tmp_path, monkeypatch):
    strike(monkeypatch, loop, "clip", signal.SIGINT, counted(8))
    strike(monkeypatch, Saver, "checkpoint", signal.SIGINT, counted(2))
    assert go("lora", base, rows_file, tmp_path / "out") == 130
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["step-000005"], "the second one did not stop at once"
    assert go("lora", base, rows_file, tmp_path / "out", "--resume", "true") == 0
    same(tmp_path / "out", whole("lora"))


def test_sigterm_and_one_sigint_still_save(base, rows_file, tmp_path, monkeypatch):
    strike(monkeypatch, loop, "clip", signal.SIGTERM, counted(3))
    strike(monkeypatch, Saver, "checkpoint", signal.SIGINT, counted(1))
    assert go("lora", base, rows_file, tmp_path / "out") == 143
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["step-000003"]


def test_a_process_and_its_shell(base, rows_file, tmp_path):
    """From outside: SIGUSR1 in a run, then the printed line in a shell, and SIGTERM in that."""
    out = tmp_path / "an out"  # the line has to be quoted
    long = ["--train.max_steps", 2000, "--train.epochs", 9000, "--eval.interval", 9000, "--train.save_interval", "null"]
    process = start("lora", base, rows_file, out, *long)
    said = struck(process, out, 3, signal.SIGUSR1)
    assert process.returncode == 75, said
    command = re.search(r"To resume: litgpt (.*)", said)
    assert command
    newest = checkpoints(out)[0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["sh", "-c", f"exec {shlex.quote(sys.executable)} -m litgpt {command[1]}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    said = struck(process, out, 2 + len(lines(out)), signal.SIGTERM)
    assert process.returncode == 143, said
    assert f"Resuming from {newest}." in said and checkpoints(out)[0] != newest
    steps = [int(line["step"]) for line in lines(out)]
    assert steps == list(range(len(steps)))


def struck(process: subprocess.Popen, out: Path, n_lines: int, number: int) -> str:
    """What a process says to a signal that it gets once it wrote so many lines of metrics."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if (out / "metrics.csv").is_file() and len(lines(out)) >= n_lines:
            break
        time.sleep(0.01)
    process.send_signal(number)
    return str(process.communicate(timeout=120)[0])


@pytest.mark.parametrize(
    ("words", "settings", "saved", "expected"),
    [
        (["--resume", "true"], {}, True, "--resume true"),
        (["--resume"], {}, True, "--resume true"),
        (["--resume=out/step-000003"], {}, True, "--resume true"),
        (["--resume", "out/step-000003"], {}, False, "--resume out/step-000003"),
        (["--overwrite", "M"], {}, True, "M --resume true"),
        (["--overwrite", "true", "M"], {}, True, "M --resume true"),
        (["--overwrite=true", "M"], {"overwrite": True}, True, "M --overwrite false --resume true"),
        (["--train.pause_after", "5", "--seed", "1", "--train.pause_after=6"], {}, True, "--seed 1 --resume true"),
        (["M", "--out_dir", "a b"], {}, False, "M --out_dir 'a b' --resume true"),
    ],
)
def test_the_command_that_goes_on(words, settings, saved, expected):
    tokens = run_words.set(("litgpt", "finetune", "lora", *words)), run_settings.set(settings)
    try:
        assert again(saved) == f"litgpt finetune lora {expected}"
    finally:
        run_words.reset(tokens[0])
        run_settings.reset(tokens[1])
