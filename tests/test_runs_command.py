"""`litgpt runs`, `runs watch`, and `runs diff`: what they show of real runs, of other folders, and of damaged ones."""

import csv
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from litgpt.__main__ import main
from litgpt.storage.outputs import is_locked, locked
from litgpt.train import runs as recorded
from litgpt.train.metrics import FIELDS, thinned
from litgpt.train.resume.state import STATE
from litgpt.train.runs import find_runs, read_run
from tests.conftest import make_rows

HEADER = ",".join(FIELDS)
LIGHTNING = (
    "epoch,iter,learning_rate,loss,step,total_tokens,val_loss\n0.5,1,1e-3,3.5,1,100,\n,,,,1,,3.25\n1,2,1e-3,3,2,200,\n"
)


def make_run(folder: Path, losses: dict[int, float], settings: str = "lora_r: 8\n", header: str = HEADER) -> Path:
    """A folder as a run leaves it that failed after these validation losses."""
    folder.mkdir(parents=True)
    lines = [header]
    for step, loss in losses.items():
        if step:
            lines.append(f"{step},0.5,{loss + 1},1e-3,,{100 * step},{step}.5,200.0,,{10**9 + step}")
        lines.append(f"{step},,,,{loss},{100 * step},{step}.5,,,")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "hyperparameters.yaml").write_text(f"out_dir: {folder.parent}\n{settings}")
    return folder


def shown(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What a command line prints on stdout."""
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two finetunes of the model that is built in, one of them evaluated."""
    top = tmp_path_factory.mktemp("real")
    (top / "rows.json").write_text(json.dumps(make_rows(8)))
    for name, lr in (("a", "1e-2"), ("b", "1e-4")):
        words = f"finetune lora pico --data {top}/rows.json --out_dir {top}/out/{name} --optimizer.lr {lr}"
        limits = "--train.max_steps 3 --eval.interval 1 --eval.max_new_tokens null --data.val_split_fraction 0.25"
        main([*words.split(), *limits.split(), "--accelerator", "cpu"])
    main(["evaluate", f"{top}/out/a/final"])
    yield top / "out"


# runs


def test_table_of_real_runs(real, capsys, monkeypatch):
    runs = {run.folder.name: run for run in find_runs([real])[0]}
    assert [*runs] == sorted(runs, key=lambda name: runs[name].best[1])
    a = runs["a"]
    with open(real / "a" / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    val = [(float(row["val_loss"]), int(row["step"])) for row in rows if row["val_loss"]]
    assert a.state == "finished" and a.settings["method"] == "lora"
    assert a.fields() == {
        "val_loss_start": val[0][0],
        "val_loss_best": min(val[1:])[0],
        "val_loss_best_step": min(val[1:])[1],
        "val_loss_last": val[-1][0],
        "reward_accuracy": None,
        "steps": int(rows[-1]["step"]),
        "tokens": int(rows[-1]["tokens"]),
        "seconds": float(rows[-1]["seconds"]),
        "peak_memory": max(int(row["peak_memory"]) for row in rows if row["peak_memory"]),
    }
    assert a.scores["rows loss"] == pytest.approx(val[-1][0], abs=0.01) and not runs["b"].scores
    monkeypatch.chdir(real.parent)
    lines = shown(capsys, "runs").splitlines()
    assert lines[1].split()[:4] == ["run", "state", "lr", "start"]
    assert [line.split()[:3] for line in lines[2:4]] == [
        [name, "finished", {"a": "0.01", "b": "0.0001"}[name]] for name in runs
    ]
    assert max(map(len, lines)) <= 80 and "Not shown: " in lines[-1]


def test_sorted_by_best_and_only_what_differs(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    make_run(here / "out/x/good", {0: 5.0, 5: 2.0, 10: 2.5}, "lora_r: 8\nseed: 1\n")
    make_run(here / "out/x/bad", {0: 5.0, 10: 4.0}, "lora_r: 32\nseed: 1\n")
    make_run(here / "out/x/none", {0: 5.0}, "lora_r: 16\nseed: 1\n")
    lines = shown(capsys, "runs").splitlines()
    assert lines[0].startswith("3 runs in out/x;")
    assert lines[1].split() == "run state lora_r start best at step last steps tokens time GB".split()
    cells = [line.split() for line in lines[2:]]
    assert cells[0] == "good failed 8 5.0000 2.0000 5 2.5000 10 1,000 0:00:10 1.00".split()
    assert [row[0] for row in cells] == ["good", "bad", "none"]
    assert "seed" not in "".join(lines) and "out_dir" not in "".join(lines)
    assert len(shown(capsys, "runs", "out", "out/x/good", "out/x").splitlines()) == len(lines)  # each once


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 200])
def test_fits_the_terminal(here, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for i in range(3):
        many = "".join(f"setting_{k}: {i}{k}\n" for k in range(20))
        make_run(here / f"out/finetune/a-rather-long-name-of-a-run-{i}", {0: 5.0, 10: 4.0 - i}, many)
    text = shown(capsys, "runs")
    assert max(map(len, text.splitlines())) <= columns
    words = text.split()
    assert {"state", "best", "4.0000", "failed"} <= {*words}
    known = {f"setting_{k}" for k in range(20)} | {"start", "step", "last", "steps", "tokens", "time", "GB"}
    flat = text.replace(",", " ").replace(".", " ").split()
    assert known <= {*flat}  # in the table, or named below it
    if columns >= 60:
        assert "setting_0" in text.partition("Not shown")[0]


def test_states(here):
    make_run(here / "failed", {0: 5.0})
    stopped = make_run(here / "stopped", {0: 5.0, 10: 4.0})
    (stopped / "step-000010").mkdir()
    (stopped / "step-000010" / STATE).touch()
    finished = make_run(here / "finished", {0: 5.0, 10: 4.0})
    (finished / "final").mkdir()
    (finished / "final" / "hyperparameters.yaml").write_text("lora_r: 8\n")
    extended = make_run(here / "extended", {0: 5.0, 10: 4.0})
    for name, step in (("final", 10), ("step-000020", 20)):
        (extended / name).mkdir()
        (extended / name / "checksums.json").write_text(json.dumps({"step": step, "files": {"x": [1, 2, 3]}}))
    (extended / "step-000020" / STATE).touch()
    make_run(here / "killed", {0: 5.0}).joinpath(".lock").touch()  # its process is gone
    running = make_run(here / "running", {0: 5.0})
    with locked(running / ".lock", "it"):
        assert is_locked(running / ".lock")
        states = {run.folder.name: run.state for run in find_runs([here])[0]}
    assert states == {
        **{name: name for name in ("failed", "stopped", "finished", "running")},
        "extended": "stopped",
        "killed": "failed",
    }
    assert not (running / ".lock").exists() and read_run(running).state == "failed"


def test_looking_at_a_lock_does_not_keep_a_run_from_starting(here):
    """A look holds the lock for a moment."""
    fcntl = pytest.importorskip("fcntl")
    (here / ".lock").touch()
    held = open(here / ".lock", "rb")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_SH)
    threading.Timer(0.05, held.close).start()
    with locked(here / ".lock", "it"):
        assert is_locked(here / ".lock")


def test_files(here, capsys):
    make_run(here / "out/a$_b$", {0: 5.0, 10: float("nan")})
    make_run(here / "out/_c", {0: 5.0, 10: 2.0}, "lora_r: 32\ndata:\n  class_path: litgpt.data.JSON\n")
    make_run(here / "out/bad\udcff\nname", {0: 5.0}, "lora_r: 64\n")
    shown(capsys, "runs", "--csv", "new/runs.csv")
    with open("new/runs.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows[0]["run"] == "out/_c" and rows[0]["lora_r"] == "32" and "data" not in rows[0]
    assert float(rows[0]["val_loss_best"]) == 2.0 and rows[0]["tokens"] == "1000"
    found = json.loads(shown(capsys, "runs", "--json"))
    assert found[0]["settings"] == {"method": "lora", "lora_r": 32, "data": "JSON"}
    assert {run["run"]: run["val_loss_last"] for run in found}["out/a$_b$"] is None  # NaN is not JSON
    pytest.importorskip("matplotlib")
    for name, start in (("losses.png", b"\x89PNG"), ("losses.SVG", b"<?xml")):
        shown(capsys, "runs", "--plot", name)
        assert Path(name).read_bytes().startswith(start)
    shown(capsys, "runs", "--plot", "losses.png")  # again
    assert "--plot losses.gif" in error(capsys, "runs", "--plot", "losses.gif")
    Path("mine.csv").write_text("mine")
    assert "--csv mine.csv" in error(capsys, "runs", "--csv", "mine.csv") and Path("mine.csv").read_text() == "mine"
    shown(capsys, "runs", "--csv", "mine.csv", "--overwrite", "true")


def test_plot_without_matplotlib(here, capsys, monkeypatch):
    make_run(here / "out/a", {0: 5.0})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(recorded, "figure_class", lambda: None)
    assert "[plot]" in error(capsys, "runs", "--plot", "x.png")


def test_no_runs(here, capsys):
    assert "There are no runs in out." in error(capsys, "runs") and "litgpt finetune" in error(capsys, "runs")
    make_run(here / "out/a", {0: 5.0})
    assert "no runs in nope." in error(capsys, "runs", "out", "nope")
    (here / "empty").mkdir()
    assert "no runs in empty." in error(capsys, "runs", "empty")


def test_runs_of_litgpt(here):
    """Lightning's metrics, in which steps are micro-batches, and settings in the result."""
    old, new = (here / f"out/lit/logs/csv/version_{n}" for n in (0, 1))
    for folder in (old, new):
        folder.mkdir(parents=True)
    (old / "metrics.csv").write_text(LIGHTNING.replace("3.25", "9"))
    (new / "metrics.csv").write_text(LIGHTNING)
    os.utime(old / "metrics.csv", (1, 1))
    (here / "out/lit/final").mkdir()
    settings = (
        "lora_r: 4\naccess_token: hf_secret\ndata:\n  class_path: litgpt.data.Alpaca\n  init_args:\n    seed: 1\n"
    )
    (here / "out/lit/final/hyperparameters.yaml").write_text(settings)
    (run,) = find_runs([here])[0]
    assert run.folder == here / "out/lit" and run.state == "finished" and run.best == (1, 3.25)
    assert run.curves.train == [(1, 3.5), (2, 3.0)] and run.curves.tokens == 200 and run.curves.seconds is None
    assert run.settings == {"method": "lora", "lora_r": 4, "data": "Alpaca", "data.seed": 1}


def test_preference_runs_and_scores(here, capsys):
    run = make_run(here / "out/a", {}, header=f"{HEADER},val_rewards/accuracies")
    with open(run / "metrics.csv", "a") as f:
        f.write("5,,,,0.6,100,1.0,,,,0.5\n9,,,,0.5,100,1.0,,,,0.875\n")
    for name, value in (("final", 0.25), ("best", 0.5)):
        (run / name / "evaluate").mkdir(parents=True)
        scores = {"arc": {"alias": "arc", "acc,none": value, "acc_stderr,none": 0.1, "f,none": "N/A"}}
        (run / name / "evaluate/results.json").write_text(json.dumps({"results": scores}))
    assert read_run(run).scores == {"best/arc acc": 0.5, "arc acc": 0.25}
    assert "87.5%" in (text := shown(capsys, "runs")) and "0.2500" in text


# odd folders


def test_damaged_and_foreign_folders(here, capsys):
    good = make_run(here / "good", {0: 5.0, 10: 4.0})
    (good / "final/evaluate").mkdir(parents=True)
    for name in ("final/evaluate/results.json", "final/checksums.json", ".litgpt.json"):
        (good / name).write_text("[1]")
    with open(good / "metrics.csv", "a") as f:
        f.write(
            "x,y\n11,,1e,,,,,,,\n99999999999,,1.0,,,,,,,\n" + "9" * 5000 + "\n12,0.5,3.0,1e-3,,1200,1.5,200.0,,12"
        )  # half-written
    (good / "hyperparameters.yaml").write_text("{{{")
    for name, content in (("foreign", b"time,speed\n1,2\n"), ("noise", os.urandom(3000)), ("nothing", b"")):
        (here / name).mkdir()
        (here / name / "metrics.csv").write_bytes(content)
    (here / "folder/metrics.csv").mkdir(parents=True)
    (here / "good/loop").symlink_to(here)
    (here / "loop").symlink_to(here / "loop")
    if hasattr(os, "mkfifo"):
        (here / "pipe").mkdir()
        os.mkfifo(here / "pipe/metrics.csv")
    (run,) = find_runs([here])[0]
    assert run.folder == good and run.curves.steps == 10 and run.best == (10, 4.0) and not run.settings
    assert shown(capsys, "runs", ".").startswith("1 run in .;")


def test_unreadable_folders_are_named(here, capsys, monkeypatch):
    make_run(here / "out/a", {0: 5.0})
    closed = make_run(here / "out/b", {0: 5.0})

    def read(folder: Path):
        if folder.name == closed.name:
            raise PermissionError(13, "Permission denied", str(folder))
        return read_run(folder)

    monkeypatch.setattr(recorded, "read_run", read)
    main(["runs"])
    printed = capsys.readouterr()
    assert printed.out.startswith("1 run in out;") and "out/b: Permission denied" in printed.err


def test_control_characters_of_a_name_are_not_printed(here, capsys):
    make_run(here / "out/\x1b[31mred\n[bold]x[/bold]", {0: 5.0})
    text = shown(capsys, "runs")
    assert "\x1b" not in text and "[bold]" in text


def test_reading_is_fast_and_once(here, monkeypatch):
    run = make_run(here / "out/a", {0: 5.0})
    with open(run / "metrics.csv", "a") as f:
        f.writelines(f"{n},0.5,{n / 3},1e-3,,{n * 100},{n}.5,200.0,,1\n" for n in range(1, 20_001))
    began = time.process_time()
    assert read_run(run).curves.steps == 20_000
    assert time.process_time() - began < 0.5  # ten times what it takes
    monkeypatch.setattr(recorded, "read_curves", None)
    assert read_run(run).curves.steps == 20_000
    assert [*map(len, (thinned(range(9), 9), thinned(range(10**5), 20), thinned([], 9)))] == [9, 20, 0]
    assert (few := thinned(range(100), 20))[0] == 0 and few[-1] == 99


# watch


def test_watch_without_a_terminal_prints_once(here, capsys):
    make_run(here / "out/a", {0: 5.0})
    assert shown(capsys, "runs", "watch") == shown(capsys, "runs")
    assert "no runs in nope" in error(capsys, "runs", "watch", "nope")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_watch_updates_until_ctrl_c(here, monkeypatch, capsys):
    """Runs that appear are shown, running ones first, and Ctrl-C ends with 130."""
    rounds = iter(range(3))

    def sleep(seconds: float) -> None:
        if next(rounds) == 2:
            raise KeyboardInterrupt
        if not (here / "out").exists():
            make_run(here / "out/good", {0: 5.0, 10: 1.0})
            make_run(here / "out/now", {0: 5.0, 10: 2.0})

    monkeypatch.setattr("litgpt.commands.runs.time", SimpleNamespace(sleep=sleep))  # other threads sleep too
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    make_run(here / "lock", {0: 5.0})
    monkeypatch.setattr(recorded, "is_locked", lambda file: file.parent.name == "now")
    with pytest.raises(SystemExit) as stop:
        main(["runs", "watch"])
    text = capsys.readouterr().out
    assert stop.value.code == 130
    assert "There are no runs in out." in text and text.rindex("now") < text.rindex("good")


# diff


def test_diff_of_real_runs(real, capsys):
    text = shown(capsys, "runs", "diff", real / "a", real / "b" / "final")
    lines = [line.split() for line in text.splitlines()]
    assert ["optimizer.lr", "0.01", "0.0001"] in lines
    assert "data, equal: base, data, training rows, validation rows" in text and "source code" in text
    assert ["step", "loss", "A", "loss", "B", "validation", "A", "validation", "B"] in lines
    steps = [line for line in lines if line[0].isdigit()]
    assert [line[0] for line in steps] == [str(n) for n in range(len(steps))] and len(steps[1]) == 5
    same = shown(capsys, "runs", "diff", real / "a", real / "a" / "final")
    assert "losses: equal" in same and "validation A" not in same


def test_diff_shows_other_rows_and_versions(here, real, capsys):
    shutil.copytree(real / "a", here / "other")
    card = here / "other/final/README.md"
    card.write_text(
        card.read_text().replace("`rows.json`: 8 rows", "`rows.json`: 9 rows").replace("chat |", "alpaca |")
    )
    lock = json.loads((here / "other/final/run.lock").read_text())
    lock["versions"]["code"], lock["order"] = "0123456789", "fedcba"
    (here / "other/final/run.lock").write_text(json.dumps(lock))
    (file,) = (here / "other").glob(f"step-*/{STATE}")
    state = torch.load(file, weights_only=True)
    name = next(name for name in state["settings"] if name.startswith("the training rows"))
    state["settings"] |= {"torch": "9.9", name: [1, 2, 3]}
    torch.save(state, file)
    text = shown(capsys, "runs", "diff", real / "a", "other")
    rows = {line[: line.index("  ")]: line.rstrip() for line in text.splitlines() if "  " in line}
    assert "`rows.json`: 9 rows" in text and "1 rows, 2 tokens, checksum 3" in text and "losses: equal" in text
    assert rows["source code"].endswith("0123456789") and rows["row order"].endswith("fedcba")
    assert "9.9" in rows["torch"] and "alpaca" in rows["prompt style"]


def test_diff_of_unlike_runs(here, capsys):
    make_run(here / "a", {step: 5 - step / 100 for step in range(0, 101, 2)}, "lora_r: 8\nseed: 1\n")
    make_run(here / "b", {0: 5.0, 50: 4.0}, "adapter_prompt_length: 10\nseed: 2\n")
    text = shown(capsys, "runs", "diff", "a", "b")
    lines = [line.split() for line in text.splitlines()]
    assert ["method", "lora", "adapter"] in lines and ["seed", "1", "2"] in lines
    assert "settings, only in A: lora_r" in text and "data: not recorded" in text
    steps = [line[0] for line in lines if line[0].isdigit()]
    assert len(steps) <= 20 and steps[0] == "0" and steps[-1] == "100"
    assert "nope is not the folder of a run" in error(capsys, "runs", "diff", "a", "nope")
    assert "OTHER" in error(capsys, "runs", "diff", "a").upper()
