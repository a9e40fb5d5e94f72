"""The screen of a run, the commands that it suggests at the end, and what it returns to Python."""

import builtins
import csv
import io
import itertools
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import litgpt.train.metrics
from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.data import JSON
from litgpt.finetune import adapter, adapter_v2, full, lora, pretrain
from litgpt.train import loop, progress, report
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.examples import LENGTH, Examples
from litgpt.train.metrics import FIELDS, Metrics
from litgpt.train.progress import NotebookOutput, Screen, Step, fit
from litgpt.train.report import quote
from litgpt.train.result import TrainingResult
from litgpt.train.schedule import Result
from tests.recorded_screens import FOLDER, KINDS, Notebook, Stream, emulate, record, set_terminal
from tests.runs import go, words

PNG = b"\x89PNG"


@pytest.fixture
def clock(monkeypatch):
    """The clock of the screen, to be set."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


# what is shown


@pytest.mark.parametrize("kind", KINDS)
def test_recorded(kind, tmp_path):
    """To record them anew: python -m tests.recorded_screens"""
    expected = (FOLDER / f"{kind}.txt").read_text(encoding="utf-8")
    assert record(kind, tmp_path) == expected
    columns = int(KINDS[kind].get("COLUMNS", 80))
    shown = [line for line in expected.splitlines() if not line.startswith("  litgpt ")]
    assert max(map(len, shown)) <= columns


def steps(n: int, seconds: float, clock: SimpleNamespace) -> Screen:
    """A screen after a run of a number of steps, each of which took a number of seconds."""
    screen = Screen(active=True)
    screen.start(0.0, f"step 0/{n}")
    for i in range(1, n + 1):
        clock.now += seconds
        screen.step(Step(i / n, f"step {i}/{n}", loss=1 / i, val_loss=2.0, details=lambda: ["lr 1.00e-03"] * 9))
    screen.stop()
    return screen


@pytest.mark.parametrize(
    ("n", "seconds", "expected"),
    [
        (1000, 0.01, 3),  # 10 seconds: the first step, one after 5 seconds, and the last
        (1000, 1.0, 101),  # one each 1% of the run, of 10 seconds
        (100_000, 1.0, 168),  # 28 hours: one each 10 minutes
        (3, 3600.0, 3),
    ],
)
def test_lines_in_a_pipe(n, seconds, expected, monkeypatch, clock):
    stream = set_terminal(monkeypatch, {})
    steps(n, seconds, clock)
    lines = stream.getvalue().splitlines()
    assert len(lines) == expected
    assert lines[0].startswith(f"step 1/{n} | loss 1.0000 | ") and lines[-1].startswith(f"step {n}/{n} | loss ")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(("n", "seconds"), [(1000, 0.01), (1000, 1000.0), (20, 0.01)])
def test_lines_in_a_terminal(n, seconds, monkeypatch, clock):
    """One each 5% of the run."""
    stream = set_terminal(monkeypatch, {"COLUMNS": "60"})
    steps(n, seconds, clock)
    assert [line.split()[1] for line in stream.shown() if line] == [f"{n * i // 20}/{n}" for i in range(1, 21)]
    assert max(map(len, stream.shown())) <= 60 and "val 2.0000" in stream.getvalue()


def test_the_live_line_gives_way(monkeypatch, clock):
    """What is most important stays."""
    for columns, expected in [
        ("40", "100% 123456/123456  0:00:00 left"),
        ("60", "100% 123456/123456  0:00:00 left  loss 0.1235  val 2.0000"),
        ("66", "100% ━━━━━━━ 123456/123456  0:00:00 left  loss 0.1235  val 2.0000"),
        ("91", "100% ━━━━ 123456/123456  0:00:00 left  loss 0.1235  val 2.0000  lr 1.00e-03  8,000 tokens/s"),
    ]:
        stream = set_terminal(monkeypatch, {"COLUMNS": columns})
        screen = Screen(active=True)
        screen.start(0.0, "step 0/123456")
        clock.now += 1
        details = lambda: ["lr 1.00e-03", "8,000 tokens/s"]  # noqa: E731
        screen.step(Step(1.0, "step 123456/123456", 0.12345, 2.0, details))
        live = stream.shown()[-1]
        assert live.replace("━", "") == expected.replace("━", "") and len(live) <= int(columns), columns
        screen.stop()
        assert next(line for line in stream.shown() if line).startswith("step 123456/123456 | loss 0.1235")


def test_fit():
    assert fit(["abc", "de", "f"], " | ", 8) == "abc | de" and fit(["abc", "de", "f"], " | ", 2) == "abc"
    assert fit(["abc", "defgh", "f"], " ", 5) == "abc"  # nothing less important in its place


@pytest.mark.parametrize("name", ["CI", "TERM", "TTY_INTERACTIVE"])
def test_no_live_line(name, monkeypatch, clock):
    value = {"CI": "true", "TERM": "dumb", "TTY_INTERACTIVE": "0"}[name]
    stream = set_terminal(monkeypatch, {"COLUMNS": "100", name: value})
    steps(20, 10.0, clock)
    assert len(stream.getvalue().splitlines()) == 20 and "\r" not in stream.getvalue()


def test_colors_in_a_pipe_are_no_terminal(monkeypatch, clock):
    stream = set_terminal(monkeypatch, {})
    monkeypatch.setenv("FORCE_COLOR", "1")
    steps(20, 10.0, clock)
    assert len(stream.getvalue().splitlines()) == 20 and "\r" not in stream.getvalue()


def test_a_narrow_encoding(monkeypatch, clock):
    raw = io.BytesIO()
    set_terminal(monkeypatch, {"COLUMNS": "80"})
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys, "stdout", stream)
    screen = Screen(active=True)
    screen.start(0.5, "step 5/10")
    assert b"###" in raw.getvalue() and b"---" in raw.getvalue() and b"?" not in raw.getvalue().replace(b"[?", b"")
    screen.stop()


def test_messages_stand_above_the_live_line(monkeypatch, clock):
    stream = set_terminal(monkeypatch, {"COLUMNS": "60"})
    error = Stream(is_terminal=True)
    monkeypatch.setattr(sys, "stderr", error)
    screen = Screen(active=True)
    screen.start(0.0, "step 0/10")
    print("a remark", file=sys.stderr)
    screen.say("a message")
    assert [line.strip() for line in stream.shown()[:2]] == ["a remark", "a message"]
    assert stream.shown()[2].startswith("  0% ─")
    screen.stop()
    assert sys.stderr is error
    monkeypatch.setattr(sys, "stderr", file := Stream(is_terminal=False))
    screen.start(0.0, "step 0/10")
    print("into a file", file=sys.stderr)
    assert file.getvalue() == "into a file\n"
    screen.stop()


def test_counting(monkeypatch, clock):
    for environment, expected in (({}, "rows: 50 of 100, 0:00:06 left"), ({"COLUMNS": "60"}, "━")):
        stream = set_terminal(monkeypatch, environment)
        with Screen(active=True).counting("rows") as show:
            clock.now += 6
            show(50, 100)
            assert expected in stream.shown()[0]
        assert stream.shown()[0] == ("" if environment else expected)


def test_a_table_keeps_paths(monkeypatch):
    """They can be copied in one piece."""
    stream = set_terminal(monkeypatch, {"COLUMNS": "40"})
    path = "/" + "a long folder/" * 5
    Screen(active=True).table("Title", {"a path": progress.unbroken(path), "empty": "", "words": "word " * 20})
    title, first, *rest = stream.shown()
    assert title == "Title" and first == f" a path  {path}"
    assert all(line.startswith((" words   word", "         word")) for line in rest[:-1]) and len(rest) > 2
    assert max(map(len, rest)) <= 40


def test_a_notebook_has_one_output(monkeypatch, clock):
    set_terminal(monkeypatch, {})
    notebook = Notebook()
    notebook.install(monkeypatch)
    screen = Screen(active=True)
    screen.say("before")
    screen.start(0.0, "step 0/10")
    assert notebook.shown()[0] == "before" and notebook.shown()[1].startswith("  0% ─")
    clock.now += 1
    screen.step(Step(0.1, "step 1/10", 0.5))
    assert notebook.shown()[1].startswith("step 1/10 | loss 0.5") and notebook.shown()[2].startswith(" 10% ━")
    screen.stop()
    assert len(notebook.outputs) == 1 and len(notebook.shown()) == 2
    assert sys.stdout.getvalue() == ""


def test_a_notebook_without_its_library(monkeypatch, capsys, clock):
    """Recognized by its shell, but nothing can be shown."""
    monkeypatch.setattr(builtins, "get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    screen = steps(20, 10.0, clock)
    assert screen.notebook is not None and isinstance(screen.notebook, NotebookOutput)
    printed = capsys.readouterr()
    assert printed.err.count("Output failed") == 1 and not printed.out


def test_other_processes_show_nothing(monkeypatch, clock):
    notebook = Notebook()
    for environment in ({}, {"COLUMNS": "80"}):
        stream = set_terminal(monkeypatch, environment)
        notebook.install(monkeypatch)
        screen = Screen(active=False)
        screen.start(0.0, "step 0/10")
        screen.step(Step(1.0, "step 10/10", 0.5))
        screen.stop()
        assert not stream.getvalue() and not notebook.outputs


def test_the_interval_of_metrics_is_not_that_of_the_screen(base, rows_file, tmp_path, capsys):
    assert go("lora", base, rows_file, tmp_path / "out", "--train.log_interval", 5, "--train.max_steps", 7) == 0
    with open(tmp_path / "out" / "metrics.csv", newline="") as f:
        assert [row["step"] for row in csv.DictReader(f) if row["loss"]] == ["5", "7"]
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if " | loss" in line] == [
        "step 1/7",
        "step 7/7",
    ]


# the plot


def plots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of metrics that each plot has, from now on. Every validation is plotted."""
    found: list[int] = []
    monkeypatch.setattr(litgpt.train.metrics, "SECONDS", 0)
    monkeypatch.setattr(litgpt.train.metrics, "SHARE", float("inf"))

    def plot(file: Path, image: Path) -> bool:
        found.append(len(file.read_text().splitlines()) - 1)
        image.write_bytes(PNG)
        return True

    monkeypatch.setattr(litgpt.train.metrics, "plot", plot)
    return found


def test_validations_are_plotted(base, rows_file, tmp_path, monkeypatch, capsys):
    found = plots(monkeypatch)
    assert go("lora", base, rows_file, tmp_path / "out") == 0
    assert found == [1, 6, 11, 16, 16]  # with the first validation, steps 4 and 8, the last one, and at the end
    assert "loss.png" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_a_run_that_ends_early_is_plotted(number, base, rows_file, tmp_path, monkeypatch):
    clip, calls = loop.clip, itertools.count(1)

    def end(*args):
        if next(calls) == 3:
            if number is None:
                raise OSError(5, "I/O error")
            os.kill(os.getpid(), number)
        return clip(*args)

    monkeypatch.setattr(loop, "clip", end)
    pytest.importorskip("matplotlib")
    assert go("lora", base, rows_file, tmp_path / "out") == (128 + number if number else 2)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(PNG)
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_plotting_takes_little_of_the_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(litgpt.train.metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    times = []

    def plot(*args: Path) -> bool:
        times.append(clock.now)
        clock.now += 2.0
        return True

    monkeypatch.setattr(litgpt.train.metrics, "plot", plot)
    with Metrics(tmp_path / "metrics.csv") as metrics:
        for _ in range(100):
            clock.now += 1.0
            metrics.write(step=1, val_loss=2.0)
    assert times == [10.0, 52.0, 94.0, clock.now - 2.0]


def test_a_plot_that_fails_is_tried_again_at_the_end_only(tmp_path, monkeypatch, capsys):
    plots(monkeypatch)
    monkeypatch.setattr(litgpt.train.metrics, "plot", lambda *args: 1 / 0)
    with Metrics(tmp_path / "metrics.csv") as metrics:
        for step in range(5):
            metrics.write(step=step, val_loss=2.0)
    assert capsys.readouterr().err.count("Cannot plot loss.png") == 2


def test_many_points_are_thinned_out(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    monkeypatch.setattr(litgpt.train.metrics, "put_single", lambda *args: None)
    rows = "".join(f"{i},,2.5,,,,,,,\n" for i in range(1, 5002))
    (tmp_path / "m.csv").write_text(",".join(FIELDS) + "\n" + rows)
    litgpt.train.metrics.plot(tmp_path / "m.csv", tmp_path / "m.png")
    points = drawn[0].axes[0].lines[0].get_xdata()
    assert len(points) < 2010 and points[0] == 1 and points[-1] == 5001
    (tmp_path / "m.csv").write_text(",".join(FIELDS) + "\n")
    assert not litgpt.train.metrics.plot(tmp_path / "m.csv", tmp_path / "m.png")


# what leads on


def suggested(printed: str) -> list[list[str]]:
    """The words of the commands after `Next:`."""
    lines = printed.split("\nNext:\n")[1].splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("  litgpt ")]


FIRST = {"pretrain": ["serve", "generate", "finetune"]}


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "adapter_v2", "pretrain"])
def test_the_commands_work(method, base, rows_file, tmp_path, monkeypatch, capsys):
    """In a folder whose name needs quotes."""
    out = tmp_path / "my run's"
    assert go(method, base, rows_file, out, "--train.max_steps", 2) == 0
    commands = suggested(capsys.readouterr().out)
    names = [command[1] for command in commands]
    assert names[:4] == [*FIRST.get(method, ["chat", "serve", "generate", "evaluate"])][:4]
    for command in commands:
        assert command[2] == str(out / "final") or command[1] == "finetune"
        typed = [word.replace("my.jsonl", str(rows_file)) for word in command[1:]]
        with pytest.raises(SystemExit) as stop:
            main([*typed, "--print_config"])
        assert not stop.value.code, command
    generate = next(command for command in commands if command[1] == "generate")
    capsys.readouterr()
    main([*generate[1:], "--max_new_tokens", "2", "--accelerator", "cpu"])
    printed = capsys.readouterr()
    assert generate[generate.index("--prompt") + 1] in " ".join((printed.out + printed.err).split())


def asked(rows: list[dict], base: Path, folder: Path, *flags: object) -> str:
    """The question that a run on these rows suggests; three dots if it has none."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(loop.Trainer, "fit", lambda self: None)
        train = [{"instruction": "not asked", "output": "a"}]
        (folder / "train.json").write_text(json.dumps(train), encoding="utf-8")
        options = ["--data.val_path", folder / "rows.json", "--data.val_split_fraction", "null", *flags]
        main(words("lora", base, folder / "train.json", folder / "out", *options))
    (found,) = (command for command in suggested(stream.getvalue()) if command[1] == "generate")
    return found[found.index("--prompt") + 1]


LONG = "please tell me something about the quick brown fox and the dog, and do so at length"
QUESTIONS = {
    "the first": ([{"instruction": "one dog", "output": "a"}, {"instruction": "two dogs", "output": "a"}], "one dog"),
    "quotes": ([{"instruction": 'what\'s "it"; $HOME `ls` \\ !', "output": "a"}], 'what\'s "it"; $HOME `ls` \\ !'),
    "an apostrophe": ([{"instruction": "what's the fox", "output": "a"}], "what's the fox"),
    "a short one": ([{"instruction": LONG, "output": "a"}, {"instruction": "two dogs", "output": "a"}], "two dogs"),
    "long ones": ([{"instruction": LONG, "output": "a"}], "please tell me something about the quick brown fox and the"),
    "without a space": ([{"instruction": "x" * 100, "output": "a"}], "x" * LENGTH),
    "several lines": ([{"instruction": "a\nb", "output": "a"}, {"instruction": "c", "output": "a"}], "c"),
    "an escape": ([{"instruction": "\x1b[31mred", "output": "a"}, {"instruction": "c", "output": "a"}], "c"),
    "a flag": ([{"instruction": "--help", "output": "a"}, {"instruction": "c", "output": "a"}], "c"),
    "an input": ([{"instruction": "a", "input": "b", "output": "a"}, {"instruction": "c", "output": "a"}], "c"),
    "none": ([{"instruction": "a", "input": "b", "output": "a"}], "..."),
    "turns": (
        [
            {"messages": [{"role": r, "content": c} for r, c in turns]}
            for turns in (
                [("system", "be kind"), ("user", "hi"), ("assistant", "yes")],
                [("user", "fox"), ("assistant", "no"), ("user", "dog"), ("assistant", "yes")],
                [("user", "the dog"), ("assistant", "yes")],
            )
        ],
        "the dog",
    ),
}


@pytest.mark.parametrize("what", QUESTIONS)
def test_the_question(what, base, tmp_path):
    rows, expected = QUESTIONS[what]
    style = ["--data.prompt_style", "chatml"] if what == "turns" else []
    assert asked(rows, base, tmp_path, *style) == expected


def test_the_question_is_that_of_the_example(base, tmp_path):
    rows = [{"instruction": text, "output": "a"} for text in ("one dog", "two dogs", "the fox")]
    assert asked(rows, base, tmp_path, "--eval.evaluate_example", 2) == "the fox"


def test_the_question_is_not_several_messages(tmp_path):
    """Also where the template writes only special tokens between them."""
    assert asked(QUESTIONS["turns"][0], PICO, tmp_path) == "the dog"


def test_a_question_that_cannot_be_found(base, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Examples, "prompt", lambda *args: 1 / 0)
    assert go("lora", base, rows_file, tmp_path / "out", "--train.max_steps", 1) == 0
    printed = capsys.readouterr()
    assert "--prompt ..." in printed.out and printed.err.count("\n") == 1


def test_quotes():
    assert [quote(t) for t in ("a", "a b", "it's", 'it\'s "b"')] == ["a", "'a b'", '"it\'s"', "'it'\"'\"'s \"b\"'"]


def test_packages_that_are_missing(monkeypatch):
    run = SimpleNamespace(
        method=SimpleNamespace(next_commands=("litgpt serve {folder}", "litgpt chat {folder}")),
        examples=SimpleNamespace(question=lambda: None),
    )
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    serve, chat = report.next_commands(run, Path("a b"))
    assert serve == "litgpt serve 'a b'  # needs pip install '.[serve]'" and chat == "litgpt chat 'a b'"


# best and last


def outcome(folder: Path, losses: list[tuple[int, float]], *names: str, partial: bool = False) -> TrainingResult:
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    return TrainingResult.of(Result(steps=30, loss=1.0, val_losses=losses), folder, partial)


def test_which_is_best(tmp_path):
    rising = [(0, 0.5), (10, 3.0), (20, 2.0), (30, 2.5)]
    assert outcome(tmp_path, rising).folder == tmp_path / "final"  # best/ was not saved
    assert outcome(tmp_path, rising, "best").folder == tmp_path / "best"
    assert outcome(tmp_path, rising).best == (20, 2.0)
    falling = [(0, 4.0), (10, 3.0), (20, 2.0), (30, 1.9)]
    assert outcome(tmp_path, falling).folder == tmp_path / "final" and outcome(tmp_path, falling).best == (30, 1.9)
    # the last one is of more rows than the others
    assert outcome(tmp_path, falling, partial=True).folder == tmp_path / "best"
    assert outcome(tmp_path, [(0, 1.0), (30, 2.0)], partial=True).best == (30, 2.0)
    nan = float("nan")
    assert outcome(tmp_path, [(10, nan), (20, 2.0), (30, nan)]).best == (20, 2.0)
    assert outcome(tmp_path, [(10, nan)]).best is None and outcome(tmp_path, []).folder == tmp_path / "final"


def test_the_report_says_which_is_best(tmp_path):
    rising = [(10, 2.0), (30, 2.5)]
    described = report.describe_results(outcome(tmp_path, rising))
    assert described["result"] == str(tmp_path / "final") and "--train.save_best true" in described["best"]
    described = report.describe_results(outcome(tmp_path, rising, "best"))
    assert described["best"] == f"2.0000 after step 10: {tmp_path / 'best'}"
    assert described["last"] == f"2.5000 after step 30: {tmp_path / 'final'}"
    assert report.describe_results(outcome(tmp_path, rising[:1]))["last"] == f"after step 30: {tmp_path / 'final'}"
    assert set(report.describe_results(outcome(tmp_path, [(30, 2.0)]))) == {"result"}


# from Python

TRAIN = TrainArgs(max_steps=6, global_batch_size=8, lr_warmup_steps=1, learning_rate=0.01, save_best=True)
EVAL = EvalArgs(interval=2, max_new_tokens=None)
MODULES = {"lora": lora, "full": full, "adapter": adapter, "adapter_v2": adapter_v2}


@pytest.mark.parametrize("name", [*MODULES, "pretrain"])
def test_a_run_returns_its_result(name, base, rows_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = {"data": JSON(str(rows_file)), "train": TRAIN, "eval": EVAL, "accelerator": "cpu"}
    if name == "pretrain":
        result = pretrain.setup(initial_checkpoint_dir=base, out_dir=out, **options)
    else:
        result = MODULES[name].setup(str(base), out_dir=out, **options)
    assert isinstance(result, TrainingResult) and result.out_dir == Path(out)
    assert result.steps == 6 and [step for step, _ in result.losses] == [1, 2, 3, 4, 5, 6]
    assert result.losses[-1][1] == result.loss and [step for step, _ in result.val_losses] == [0, 2, 4, 6]
    assert result.best == min(result.val_losses[1:], key=lambda pair: pair[1])
    assert result.folder == Path(out) / ("final" if result.best[0] == 6 else "best") and result.folder.is_dir()
    assert result.tokens > 0 and result.seconds > 0
    if name == "lora":
        again = MODULES[name].setup(base, out_dir=out, resume=True, **options)
        assert again.losses == result.losses and again.val_losses == result.val_losses
        assert (again.folder, again.best, again.steps, again.loss) == (
            result.folder, result.best, result.steps, result.loss,
        )  # fmt: skip


def test_emulate():
    assert emulate("a\nbc\r\x1b[2Kd\n\x1b[36me\x1b[0m\x1b[1A\rf") == ["a", "f", "e"]
