"""Sweeps: several finetunes in one process, each as if it were alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint
from litgpt.commands.sweep import bounds, grid, random_trials, seconds_of
from litgpt.errors import UserError
from tests.runs import lines, same


def words(base: Path, rows: Path, out: Path, *more: object) -> list[str]:
    options = "--precision 32-true --accelerator cpu --train.max_steps 8 --train.global_batch_size 8 --train.epochs 9 "
    options += "--eval.max_new_tokens null --data.val_split_fraction 0.1 --lora_dropout 0.1"
    return ["finetune", "lora", str(base), str(rows), *options.split(), "--out_dir", str(out), *map(str, more)]


def folders(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.is_dir())


@pytest.mark.parametrize("more", [[], pytest.param(["--quantize", "bnb.nf4"], marks=pytest.mark.long)])
def test_each_trial_is_as_if_it_were_alone(more, base, rows_file, tmp_path, capsys, monkeypatch):
    """Frozen weights are read once."""
    out, tensors, read = tmp_path / "sweep", Checkpoint.tensors, list[str]()

    def counted(self, names):
        read.extend(names := list(names))
        return tensors(self, names)

    with monkeypatch.context() as m:
        m.setattr(Checkpoint, "tensors", counted)
        main(words(base, rows_file, out, *more, "--sweep", "lr=1e-3,1e-2", "--sweep", "lora_r=2"))
    assert len(read) == len(set(read)) > 0
    printed = capsys.readouterr().out
    assert [path.name for path in folders(out)] == ["001-lr=1e-3-lora_r=2", "002-lr=1e-2-lora_r=2"]
    for path, lr in zip(folders(out), ("1e-3", "1e-2")):
        alone = tmp_path / f"alone-{path.name}"
        main(words(base, rows_file, alone, *more, "--optimizer.lr", lr, "--lora_r", 2))
        same(path, alone)
        assert "validation loss" in (path / "log.txt").read_text()
    best = {path: min(float(line["val_loss"]) for line in lines(path) if line["val_loss"]) for path in folders(out)}
    winner = min(best, key=lambda path: best[path])
    assert f"{best[winner]:.4f}" in printed and f"Best:   {winner / 'final'}" in printed
    assert "--config" in printed and (out / "best.yaml").read_text() == (winner / "hyperparameters.yaml").read_text()


def test_again_repeats_nothing(base, rows_file, tmp_path, capsys):
    sweep = words(base, rows_file, tmp_path / "sweep", "--sweep", "lr=1e-3,1e-2")
    main(sweep)
    times = [(path / "final" / "checksums.json").stat().st_mtime_ns for path in folders(tmp_path / "sweep")]
    first = capsys.readouterr().out.partition("at step")[2]
    main(sweep)
    assert [(p / "final" / "checksums.json").stat().st_mtime_ns for p in folders(tmp_path / "sweep")] == times
    assert capsys.readouterr().out.partition("at step")[2] == first
    with pytest.raises(SystemExit):
        main(words(base, rows_file, tmp_path / "sweep", "--sweep", "lr=1e-3,2e-2"))
    assert "another sweep" in capsys.readouterr().err


def test_a_trial_that_fails_is_a_row(base, rows_file, tmp_path, capsys):
    main(words(base, rows_file, tmp_path / "sweep", "--sweep", "lora_r=0,2"))
    out = capsys.readouterr().out
    assert "lora_r" in out and "finished" in out and "1 of 2  --lora_r 0: " in out
    with pytest.raises(SystemExit):
        main(words(base, rows_file, tmp_path / "all", "--sweep", "lora_r=0,-1"))
    assert "All trials failed" in capsys.readouterr().err


def test_the_worse_half_stops_early(base, rows_file, tmp_path, capsys):
    """Four trials run a quarter, two of them a half, one to the end, with the schedule of the complete run."""
    out = tmp_path / "sweep"
    main(words(base, rows_file, out, "--sweep", "lr=1e-5,1e-4,1e-3,1e-2", "--sweep_budget", "10m"))
    steps = [max(int(line["step"]) for line in lines(path)) for path in folders(out)]
    assert sorted(steps) == [2, 2, 4, 8]
    winner = folders(out)[steps.index(8)]
    alone = tmp_path / "alone"
    main(words(base, rows_file, alone, "--optimizer.lr", winner.name.partition("lr=")[2]))
    same(winner, alone)
    out = capsys.readouterr().out
    assert out.count("stopped") == 3 and f"Best:   {winner / 'final'}" in out


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="kills a process")
def test_killed_twice_and_continued(base, rows_file, tmp_path, capsys):
    sweep = ["--sweep", "lr=1e-3,3e-3,1e-2", "--train.save_interval", "2"]
    command = [sys.executable, "-m", "litgpt", *words(base, rows_file, tmp_path / "killed", *sweep)]
    for n in (1, 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(list((tmp_path / "killed").glob("*/metrics.csv"))) < n:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    main(words(base, rows_file, tmp_path / "killed", *sweep))
    main(words(base, rows_file, tmp_path / "whole", *sweep))
    for a, b in zip(folders(tmp_path / "killed"), folders(tmp_path / "whole")):
        same(a, b)


@pytest.mark.parametrize(
    "flags",
    [
        ["--sweep"],
        ["--sweep", "lr"],
        ["--sweep", "lr=log:1e-5:1e-3"],
        ["--sweep", "lr=log:1e-3:1e-5", "--sweep_random", "3"],
        ["--sweep", "lr=1,2", "--sweep_random", "no"],
        ["--sweep", "lr=1,2", "--sweep_budget", "soon"],
        ["--sweep_random", "3"],
        ["--sweep", "lr=1,2", "--resume", "true"],
        ["--sweep", "lr=1,2", "--print_config"],
    ],
)
def test_refused(flags, base, rows_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(words(base, rows_file, tmp_path / "sweep", *flags))
    assert e.value.code == 2 and not (tmp_path / "sweep").exists()
    assert "--sweep" in capsys.readouterr().err


def test_spaces():
    assert grid({"a": "1,2", "b": "x"}) == [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]
    draws = random_trials({"lr": "log:1e-5:1e-3", "r": "2:9", "x": "0.5:0.6", "kind": "a,b"}, "200")
    assert draws == random_trials({"lr": "log:1e-5:1e-3", "r": "2:9", "x": "0.5:0.6", "kind": "a,b"}, "200")
    rates = sorted(float(d["lr"]) for d in draws)
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-3 and 5e-5 < rates[100] < 2e-4  # the middle is that of the exponents
    assert {d["r"] for d in draws} == set("23456789") and {d["kind"] for d in draws} == {"a", "b"}
    assert all(0.5 <= float(d["x"]) <= 0.6 for d in draws)
    assert bounds("1,2") is None and bounds("1:2") == (False, 1.0, 2.0) and bounds("a:b") is None
    assert seconds_of("15m") == 900 and seconds_of("90s") == seconds_of("90") == 90
    with pytest.raises(UserError):
        seconds_of("1 day")
    assert json.dumps(draws)
