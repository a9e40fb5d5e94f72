"""What only shows or records a run neither ends it nor takes its result: each failure is one line on stderr."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.model.devices import peak_memory
from litgpt.train import examples, flops, run
from litgpt.train.metrics import FIELDS, Metrics, plot
from litgpt.train.progress import Screen, Step
from litgpt.train.resume import save
from tests.conftest import some
from tests.runs import go, lines, same, start
from tests.test_training import read_metrics


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def no_disk_for_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", failing(OSError(28, "No space left on device")))


def metrics_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for a while, between two checkpoints."""
    write, called = Metrics.write_waiting, []

    def sometimes(self: Metrics) -> None:
        called.append(1)
        if len(called) in (2, 3, 4):
            raise OSError(28, "No space left on device")
        write(self)

    monkeypatch.setattr(Metrics, "write_waiting", sometimes)


class Broken(io.StringIO):
    """A stream that takes some characters."""

    def __init__(self, error: Exception, takes: int = 2000) -> None:
        super().__init__()
        self.error, self.takes = error, takes

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.takes:
            raise self.error
        return super().write(text)


class BrokenTerminal(Broken):
    def isatty(self) -> bool:
        return True


def set_stdout(stream: io.StringIO | None) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(sys, "stdout", stream)


# what fails: how, the flags of the run, and the lines on stderr, each by a part of it
FAILURES: dict[str, tuple[Callable[[pytest.MonkeyPatch], Any], list[str], list[str]]] = {
    "no figures": (no_figures, [], ["loss.png"]),
    "no disk for the picture": (no_disk_for_the_picture, [], ["loss.png"]),
    "examples": (
        lambda m: m.setattr(examples, "generate", failing(KeyError("no such token"))),
        ["--eval.max_new_tokens", "4"],
        ["examples (before)", "examples (after)"],
    ),
    "a refused prompt": (
        lambda m: m.setattr(examples, "generate", failing(UserError("the template has no place for it"))),
        ["--eval.max_new_tokens", "4", "--eval.exact_match", "2", "--eval.examples", "2"],
        ["examples (before)", "exact answers (before)", "examples (after)", "exact answers (after)"],
    ),
    "the reference answers": (
        lambda m: m.setattr(save, "make_reference_outputs", failing(RuntimeError())),
        [],
        ["reference outputs"],
    ),
    "their types": (lambda m: m.setattr(save, "stored_dtypes", failing(KeyError())), [], ["reference outputs"]),
    "the report": (lambda m: m.setattr(run, "print_report", failing(ZeroDivisionError())), [], ["report"]),
    "the timing": (lambda m: m.setattr(flops, "gemm_throughput", failing(RuntimeError("busy"))), [], ["utilization"]),
    "metrics that wait": (metrics_that_wait, [], ["metrics.csv"]),
    "a reader that is gone": (set_stdout(Broken(BrokenPipeError())), [], ["Output failed"]),
    "a log on a full disk": (set_stdout(Broken(OSError(28, "No space left"))), [], ["Output failed"]),
    "a closed stream": (set_stdout(Broken(ValueError("I/O operation on closed file"), 0)), [], ["Output failed"]),
    "a terminal that is gone": (set_stdout(BrokenTerminal(OSError(5, "I/O error"))), [], ["Output failed"]),
    "no stdout": (set_stdout(None), [], []),
}


@pytest.mark.parametrize("what", some(FAILURES, "the report", "a terminal that is gone", "a log on a full disk"))
def test_the_run_goes_on(what, whole, base, rows_file, tmp_path, monkeypatch, capsys):
    """Bit for bit: a model that stayed in evaluation, without its dropout, would show."""
    expected, out = whole("lora"), tmp_path / "out"
    fail, flags, said = FAILURES[what]
    with monkeypatch.context() as patched:
        fail(patched)
        capsys.readouterr()
        assert go("lora", base, rows_file, out, *flags) == 0
        error = capsys.readouterr().err.splitlines()
    assert len(error) == len(said) and all(a in b for a, b in zip(said, error)), error
    same(out, expected)
    main(["validate", str(out / "final"), "--accelerator", "cpu"])


def test_the_reader_of_the_output_goes_away(base, rows_file, tmp_path):
    """As in `litgpt finetune ... | head -1`."""
    out = tmp_path / "out"
    process = start("lora", base, rows_file, out, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr and process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(120) == 0, error
    assert error.count("\n") == 1 and "Output failed" in error, error
    assert (out / "final" / "adapter_model.safetensors").is_file() and lines(out)[-1]["step"] == "12"


def test_nobody_reads_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError(), 0))
    with pytest.raises(SystemExit) as stop:
        main(["no-such-command"])
    assert stop.value.code == 2


@pytest.mark.parametrize("term", ["xterm", "dumb", "unknown", None])
@pytest.mark.parametrize("columns", ["0", "1", "20", "80", "", "wide"])
def test_odd_terminals(term, columns, monkeypatch):
    """Wherever the output goes, the step is shown."""
    monkeypatch.delenv("TERM", raising=False)
    if term:
        monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", columns)
    terminal = BrokenTerminal(AssertionError(), 10**6)
    monkeypatch.setattr(sys, "stdout", terminal)
    screen = Screen(active=True)
    screen.say("hello there")
    with screen.counting("rows") as count:
        count(7)
    screen.start(0.0, "step 0/10")
    screen.step(Step(0.1, "step 1/10", loss=2.5))
    screen.step(Step(1.0, "step 10/10", loss=2.5))
    screen.stop()
    text = terminal.getvalue()
    assert "hello there" in text and "step 10/10" in text and "loss 2.5" in text


@pytest.mark.parametrize("backend", some(["module://matplotlib_inline.backend_inline", "nonsense", "tkagg"], "tkagg"))
def test_backends_of_a_picture(backend, tmp_path):
    """In a process of its own: matplotlib reads the variable when it is imported."""
    pytest.importorskip("matplotlib")
    (tmp_path / "m.csv").write_text(",".join(FIELDS) + "\n1,,2.5,,,,,,,\n")
    code = "import sys; from pathlib import Path; from litgpt.train.metrics import plot; plot(*map(Path, sys.argv[1:]))"
    environment = {**os.environ, "MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path)}
    words = [sys.executable, "-c", code, str(tmp_path / "m.csv"), str(tmp_path / "m.png")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or backend == "nonsense", done.stderr
    assert (tmp_path / "m.png").is_file() == (backend != "nonsense")


def test_losses_that_are_not_finite_are_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for losses in (("2.5", "nan", "inf"), ("nan", "-inf", "")):
        rows = [f"{i},,{loss},,{loss},,,,,\n" for i, loss in enumerate(losses)]
        (tmp_path / "m.csv").write_text(",".join(FIELDS) + "\n" + "".join(rows))
        (tmp_path / "m.png").unlink(missing_ok=True)
        assert plot(tmp_path / "m.csv", tmp_path / "m.png") and (tmp_path / "m.png").stat().st_size > 1000


def test_a_memory_that_is_not_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", failing(RuntimeError("no driver")))
    assert peak_memory(torch.device("cuda")) is None


def test_more_than_the_machine_can_is_not_shown(base, rows_file, tmp_path, monkeypatch, capsys):
    """A utilization above 100 %: the products were timed while the machine was busy."""
    monkeypatch.setattr(flops, "gemm_throughput", lambda *args: 1.0)
    assert go("lora", base, rows_file, tmp_path / "busy", "--train.max_steps", 2) == 0
    assert [m["mfu"] for m in read_metrics(tmp_path / "busy")] == [""] * len(read_metrics(tmp_path / "busy"))
    monkeypatch.setattr(flops, "gemm_throughput", lambda *args: 1e15)
    assert go("lora", base, rows_file, tmp_path / "idle", "--train.max_steps", 2) == 0
    found = [float(m["mfu"]) for m in read_metrics(tmp_path / "idle") if m["loss"]]
    assert len(found) == 2 and all(0 <= mfu <= 1 for mfu in found)
    work = flops.FlopCounter(per_token=100, per_target=50, peak=1000)
    assert work.share(8, 4, seconds=2, devices=1) == (8 * 100 + 4 * 50) / 2000
    assert work.share(8, 4, seconds=0.5, devices=2) == 1.0 and work.share(8, 4, seconds=0.4, devices=2) is None
    assert work.share(8, 4, seconds=0, devices=1) is None
