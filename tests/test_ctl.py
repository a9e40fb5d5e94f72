"""`litgpt ctl`: a run follows commands between its steps; a resumed or repeated run does so at the same steps."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.train import inbox, loop
from litgpt.train.control import Control
from litgpt.train.inbox import Command, is_live, send, wait, waiting
from litgpt.train.metrics import EVENT, FIELDS, is_event, lines_until, timeline
from litgpt.train.resume.state import damage
from litgpt.train.run_lock import read_lock
from litgpt.train.runs import find_run
from tests.ranks import ended, start
from tests.runs import exit_code, go, lines, weights, words

Tell = Callable[[dict[int, list[str]]], None]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def tell(out: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Type `litgpt ctl OUT ...` in another thread during some steps of the run in this process. The run goes on once it
    has the command."""
    monkeypatch.setattr(inbox, "GRACE", 20.0)
    original, at = Control.n_due, dict[int, list[str]]()

    def n_due(self: Control, step: int) -> int:
        if step in at and self.place is not None:
            threading.Thread(target=exit_code, args=("ctl", out, *at.pop(step))).start()
            until = time.monotonic() + 60
            while not waiting(self.place) and time.monotonic() < until:
                time.sleep(0.01)
        return original(self, step)

    monkeypatch.setattr(Control, "n_due", n_due)
    return at.update


def crash_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run fail in this call of a step, before its weights change, as if it was killed."""
    calls, original = [], loop.clip

    def clip(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == step:
            monkeypatch.setattr(loop, "clip", original)
            raise RuntimeError("killed")
        return original(*args)

    monkeypatch.setattr(loop, "clip", clip)


def events(out: Path) -> list[tuple[int, str]]:
    return [(int(line["step"]), line["event"]) for line in lines(out) if line["event"]]


def numbers(out: Path) -> list[dict[str, str]]:
    return [line for line in lines(out) if not line["event"]]


def same_numbers(a: Path, b: Path) -> None:
    assert numbers(a) == numbers(b)
    assert all(torch.equal(weight, weights(b)[name]) for name, weight in weights(a).items())


def test_what_does_not_change_the_result(out, tell, base, rows_file, whole, capsys):
    tell({3: ["sample", "the quick brown fox?"], 6: ["save"], 7: ["eval"]})
    assert go("lora", base, rows_file, out, "--train.keep_last", "null") == 0
    assert damage(out / "step-000006") is None
    assert events(out) == [(3, "sample"), (6, "save"), (7, "eval")]
    printed = capsys.readouterr().out
    assert printed.count("step 3/12 | sample: the quick brown fox?\n  -> ") == 2, "one by the run, one by the command"
    assert printed.count(f"step 6/12 | saved {out / 'step-000006'}") == 2
    assert re.search(r"step 7/12 \| validation loss \S+, best ", printed)
    assert [line["step"] for line in numbers(out) if line["val_loss"]] == ["0", "4", "7", "8", "12"]
    assert all(torch.equal(weight, weights(whole("lora"))[name]) for name, weight in weights(out).items())
    assert not (out / inbox.INBOX).exists()
    lock = read_lock(out / "final")
    assert lock is not None and lock["events"] == [[3, "sample"], [6, "save"], [7, "eval"]]


def test_a_learning_rate_and_a_stop(out, tell, base, rows_file, whole, tmp_path, capsys):
    tell({4: ["lr", "0.005"], 7: ["stop"]})
    assert go("lora", base, rows_file, out) == 143
    printed = capsys.readouterr().out
    assert "peak learning rate 0.01 -> 0.005" in printed
    assert f"stopped. Saved {out / 'step-000007'}. To resume: " in printed
    assert go("lora", base, rows_file, out, "--resume", "true") == 0
    assert "set by litgpt ctl at step 4" in " ".join(capsys.readouterr().out.split())
    assert events(out) == [(4, "lr 0.005"), (7, "stop")]
    rates = [[float(line["lr"]) for line in lines(place) if line["lr"]] for place in (out, whole("lora"))]
    halves = [own / before for own, before in zip(*rates)]
    assert halves[:4] == [1.0] * 4 and halves[4:-1] == pytest.approx([0.5] * 7)
    tell({4: ["lr", "5e-3"]})
    out.rename(tmp_path / "stopped")
    assert go("lora", base, rows_file, out) == 0
    same_numbers(out, tmp_path / "stopped")


def test_a_killed_run_repeats_what_came_after_its_checkpoint(out, tell, base, rows_file, tmp_path, monkeypatch):
    flags = ["--eval.interval", "auto", "--train.save_best", "true", "--eval.early_stopping_patience", 4]
    told = {4: ["lr", "0.005"], 6: ["lr", "0.02"], 7: ["eval"]}
    tell(told)
    assert go("lora", base, rows_file, out, *flags) == 0
    out.rename(tmp_path / "straight")
    tell(told)
    for step in (9, 1):  # twice back to step 5, of which the second time happens before the events after it
        crash_in(monkeypatch, step)
        with pytest.raises(RuntimeError):
            go("lora", base, rows_file, out, *flags, "--resume", "auto", "--train.keep_last", "null")
        for path in [*out.glob("step-*"), *out.glob("best")]:
            if int(json.loads((path / "checksums.json").read_text())["step"]) > 5:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
    assert go("lora", base, rows_file, out, *flags, "--resume", "true") == 0
    assert sorted(events(out)) == [(4, "lr 0.005"), (6, "lr 0.02"), (7, "eval")]
    same_numbers(out, tmp_path / "straight")
    assert [line["step"] for line in numbers(out) if line["val_loss"]] == ["0", "2", "4", "6", "7", "9", "11", "12"]


def test_a_rerun_repeats_the_events(out, tell, base, rows_file, whole, tmp_path, capsys):
    tell({3: ["lr", "0.002"], 6: ["eval"]})
    assert go("lora", base, rows_file, out) == 0
    assert exit_code("rerun", out, "--out_dir", tmp_path / "again") == 0
    assert "All 12 losses are equal." in capsys.readouterr().out
    assert sorted(events(tmp_path / "again")) == events(out)
    same_numbers(tmp_path / "again", out)
    assert read_lock(tmp_path / "again" / "final") == read_lock(out / "final")
    assert numbers(out) != numbers(whole("lora"))
    html = tmp_path / "report.html"
    assert exit_code("report", out, "--out", html) == 0
    assert "step 3" in html.read_text() and "lr 0.002" in html.read_text()


def test_validations_on_request_do_not_stop_a_run(out, tell, base, rows_file):
    """With this rate the loss is best after step 2. Of the validations after that, only that of step 4 was due."""
    tell({2: ["eval"], 3: ["eval"]})
    flags = ["--optimizer.lr", 10, "--eval.early_stopping_patience", 1, "--train.max_steps", 10, "--eval.interval", 4]
    assert go("lora", base, rows_file, out, *flags) == 0
    assert find_run(out).curves.steps == 4


def test_new_options_replace_the_learning_rate(out, tell, base, rows_file, capsys):
    tell({3: ["lr", "0.002"], 5: ["stop"]})
    assert go("lora", base, rows_file, out) == 143
    flags = ["--optimizer.lr", 0.007, "--resume", "true", "--resume_with_changes", "true"]
    tell({7: ["stop"]})
    assert go("lora", base, rows_file, out, *flags) == 143
    assert "learning rate 0.007" in capsys.readouterr().out
    flags[-2:] = []
    assert go("lora", base, rows_file, out, *flags) == 0
    assert "learning rate 0.007" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("lr", "lr"),
        ("lr fast", "fast"),
        ("lr nan", "nan"),
        ("lr inf", "inf"),
        ("lr 0", "lr 0"),
        ("lr=-1e-5", "lr"),
        ("sample", "sample"),
        ("save now", "now"),
        ("pause", "pause"),
        ("lr 1e-4", "metrics.csv"),
    ],
)
def test_wrong_commands(line, named, out, capsys):
    out.mkdir()
    assert exit_code("ctl", out, *line.split()) == 2
    assert named in capsys.readouterr().err and not any(out.iterdir())


def test_what_a_run_refuses(out, tell, base, rows_file, capsys):
    flags = ["--train.min_lr", 1e-4, "--data.val_split_fraction", 0, "--train.max_steps", 6]
    tell({2: ["lr", "1e-5"], 3: ["eval"], 4: ["sample", "x " * 5000]})
    assert go("lora", base, rows_file, out, *flags) == 0
    captured = capsys.readouterr()
    assert "--train.min_lr" in captured.err and "no validation rows" in captured.err and "tokens" in captured.err
    assert not events(out)


def test_without_a_live_run(out, base, rows_file, monkeypatch, capsys):
    """A finished run is told nothing; what a killed run has not taken is not for the next one."""
    out.mkdir()
    (out / inbox.INBOX).mkdir()
    send(out, Command("stop"))
    (out / inbox.INBOX / "1.json").write_text("{")
    answers = []

    def n_due(self: Control, step: int) -> int:
        if step == 3:
            (out / inbox.INBOX / "2.json").write_text('{"action": "fit", "value": null}')
            (out / inbox.INBOX / "3.json").write_text("[" * 10000)
        if step == 12:
            answers.append(send(out, Command("save")))  # taken after the last step
        return len(waiting(out / inbox.INBOX))

    monkeypatch.setattr(Control, "n_due", n_due)
    monkeypatch.setattr(inbox, "GRACE", 0)
    assert go("lora", base, rows_file, out) == 0
    assert events(out) == [(12, "save")]
    capsys.readouterr()
    assert exit_code("ctl", out, "save") == 2
    assert "finished" in capsys.readouterr().err
    (out / inbox.INBOX).mkdir()  # as a killed run leaves it
    assert exit_code("ctl", out / "final", "save") == 2
    with pytest.raises(Exception, match="ended before"):
        wait(out, answers[0], 5)


def test_a_run_that_takes_its_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("litgpt.commands.ctl.is_live", lambda place: True)
    monkeypatch.setattr(inbox, "is_live", lambda place: True)
    (tmp_path / inbox.INBOX).mkdir()
    assert exit_code("ctl", tmp_path, "lr", "1e-4", "--timeout", "0.1") == 0
    assert "after its current step" in capsys.readouterr().out
    assert [c.value for c in inbox.take(tmp_path / inbox.INBOX)] == ["1e-4"]
    assert exit_code("ctl", tmp_path, "sample", "1 + 1: [a]", "--timeout", "0") == 0
    assert exit_code("ctl", tmp_path, "save", "--timeout", "0") == 0
    assert [c.value for c in inbox.take(tmp_path / inbox.INBOX)] == ["1 + 1: [a]", None]


def test_events_in_metrics(tmp_path):
    head, empty = ",".join([*FIELDS, EVENT]), "," * (len(FIELDS) - 1)
    texts = [f"1{empty},lr 1e-05", f"2{empty},sample", f"9{empty},lr 0.5", f"9{empty},eval", f"9{empty},stop"]
    bad = [f"1{empty},lr x", f"1{empty},rm -rf", f"1{empty},lr 1.2.3"]
    (tmp_path / "m.csv").write_text("\n".join([head, *texts, *bad]) + "\n")
    kept = [row[EVENT] for row in lines_until(tmp_path / "m.csv", 4, 0)]
    assert kept == ["lr 1e-05", "sample", "lr 0.5", "eval"], "repeated events stay"
    assert timeline([(1, "lr 1"), (9, "lr 2"), (9, "eval"), (5, "lr 3")]) == [(1, "lr 1"), (5, "lr 3"), (9, "eval")]
    assert is_event([3, "lr 0.1"]) and not any(map(is_event, ([3, "lr x"], ["3", "eval"], [True, "eval"], 3, "ab")))


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(strategy, out, base, rows_file, tmp_path):
    """All ranks follow after the same step: a run that was told things holds the same weights on all of them, and those
    of the repeated run."""
    flags = ["--devices", 2, "--strategy", strategy, "--train.max_steps", 300, "--train.epochs", 100]
    line = words("full" if strategy == "fsdp" else "lora", base, rows_file, out, *flags)
    run = start(tmp_path, line)
    answers = []
    try:
        until = time.monotonic() + 90
        while not is_live(out) and time.monotonic() < until:
            time.sleep(0.1)
        for action, value in (("lr", "0.005"), ("sample", "the fox"), ("eval", None), ("save", None), ("stop", None)):
            answers.append(wait(out, send(out, Command(action, value)), 60))
    finally:
        printed = ended(run, 143)
    assert None not in answers and "To resume" in printed, answers
    found = events(out)
    assert [text.split()[0] for _, text in found] == ["lr", "sample", "eval", "save", "stop"]
    last = found[-1][0]
    ended(start(tmp_path, [*line, "--resume", "true", "--train.pause_after", "2"]), 75)
    assert numbers(out)[-1]["step"] == str(last + 2)
