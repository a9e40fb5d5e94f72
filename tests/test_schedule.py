"""The learning rate over a run, and where a run ends."""

import itertools
import json
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.train import loop
from litgpt.train.args import TrainArgs
from litgpt.train.devices import one_device
from litgpt.train.schedule import Plan, Result, learning_rate
from tests.conftest import make_rows
from tests.test_training import losses, read_metrics


def test_cosine():
    rates = [learning_rate(step, 10, 2, 1.0, 0.1) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < rates[9] < 0.2


def test_linear():
    rates = [learning_rate(step, 10, 2, 1.0, 0.2, "linear") for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert [a - b for a, b in itertools.pairwise(rates[2:11])] == pytest.approx([0.1] * 8)
    assert rates[10] == rates[11] == pytest.approx(0.2)


def test_constant():
    assert [learning_rate(step, 10, 2, 1.0, 0.1, "constant") for step in range(12)] == [0.5, *[1.0] * 11]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_warmup(schedule):
    assert learning_rate(0, 5, 0, 1.0, 0.0, schedule) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_stays_at_its_least(schedule):
    assert [learning_rate(step, 6, 0, 1.0, 0.25, schedule) for step in (6, 7, 100)] == pytest.approx([0.25] * 3)


class Rows:
    """Ten rows of four tokens."""

    lengths = torch.full((10,), 4)

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize(
    ("train", "plan"),
    [
        (dict(epochs=3, lr_warmup_steps=2), (8, 2, 8, None)),  # 30 rows, the last step is smaller
        (dict(epochs=3, lr_warmup_steps=0), (8, 0, 8, None)),
        (dict(epochs=3, max_steps=5, lr_warmup_steps=2), (5, 2, 5, None)),
        (dict(max_tokens=33, lr_warmup_steps=2), (13, 2, None, None)),
        (dict(max_tokens=33, epochs=None, lr_warmup_steps=2), (None, 2, None, None)),
        (dict(max_time=9.5, epochs=None, lr_warmup_fraction=0.2), (None, 0, None, None)),
        (dict(max_time=9.5, max_steps=5, lr_warmup_steps=20), (5, 0, None, 20)),
        (dict(max_time=9.5, epochs=None, lr_warmup_steps=20, lr_decay_iters=7), (None, 0, 7, 20)),
        (dict(max_steps=10, epochs=50, lr_warmup_fraction=0.2), (10, 2, 10, None)),
        (dict(max_steps=10, epochs=50, lr_warmup_steps=2, lr_decay_iters=6), (10, 2, 6, None)),
        (dict(max_steps=10, epochs=50, lr_warmup_steps=2, lr_decay_iters=60), (10, 2, 60, None)),
        (dict(max_steps=20, epochs=50, lr_warmup_steps=15, lr_decay_iters=10), (20, 1, 10, 15)),
        (dict(max_steps=20, epochs=50, lr_warmup_steps=21), (20, 2, 20, 21)),
    ],
)
def test_plan(train, plan):
    made = Plan(TrainArgs(global_batch_size=4, **train), Rows())  # type: ignore[arg-type]
    assert (made.steps, made.warmup, made.decay, made.requested_warmup) == plan


# time and tokens as limits: 8 tokens per second


def made(**train: Any) -> Plan:
    return Plan(TrainArgs(global_batch_size=4, **train), Rows())  # type: ignore[arg-type]


def after(steps: int, seconds: float) -> Result:
    return Result(steps=steps, seconds=seconds, tokens=round(8 * seconds))


LIMITS = [dict(max_time=40.0, epochs=None), dict(max_tokens=320, epochs=None), dict(max_time=40.0, max_tokens=10**6)]
LIMITS += [dict(max_time=40.0, max_steps=10**6, epochs=None), dict(max_tokens=320, max_time=10**6)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.25])
def test_the_rate_follows_what_is_used(limits, schedule, fraction):
    """By the formula, whatever a step takes."""
    plan = made(**(dict(epochs=10**6) | limits), lr_warmup_fraction=fraction)
    for steps, seconds in ((1, 1), (3, 7), (30, 10), (31, 25), (200, 39), (201, 40)):
        share = seconds / 40
        done = after(steps, seconds)
        assert plan.fraction_done(done) == pytest.approx(share) and plan.is_done(done) == (share == 1)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * (share - fraction) / (1 - fraction))), "constant": 1.0}
        left["linear"] = 1 - (share - fraction) / (1 - fraction)
        rate = 0.1 + (1.0 - 0.1) * left[schedule]
        if steps < fraction * steps / share:
            rate = min(1.0, (steps + 1) / steps * share / fraction)
        assert plan.learning_rate(done, 1.0, 0.1, schedule) == pytest.approx(rate)
    if schedule != "constant":
        assert plan.learning_rate(after(201, 40), 1.0, 0.1, schedule) == pytest.approx(0.1)


@pytest.mark.parametrize("limits", LIMITS)
def test_steps_that_all_take_the_same_are_those_of_a_run_of_known_length(limits):
    plan = made(**(dict(epochs=10**6) | limits), lr_warmup_steps=6)
    rates = [plan.learning_rate(after(k, 0.5 * k), 1.0, 0.1, "cosine") for k in range(1, 81)]
    assert rates == pytest.approx([learning_rate(k, 80, 6, 1.0, 0.1) for k in range(1, 81)])
    long = made(**(dict(epochs=10**6) | limits), lr_warmup_steps=100)  # at most a tenth
    rates = [long.learning_rate(after(k, 0.5 * k), 1.0, 0.1, "cosine") for k in range(1, 81)]
    assert rates == pytest.approx([learning_rate(k, 80, 8, 1.0, 0.1) for k in range(1, 81)])
    named = made(**(dict(epochs=10**6) | limits), lr_warmup_steps=6, lr_decay_iters=20)
    rates = [named.learning_rate(after(k, 0.5 * k), 1.0, 0.1, "cosine") for k in range(1, 81)]
    assert rates == pytest.approx([learning_rate(k, 20, 6, 1.0, 0.1) for k in range(1, 81)])


def test_the_first_step_of_such_a_run():
    for limits in LIMITS:
        most = limits.get("max_tokens", 10**6) / 16 / 10  # a tenth of the steps, as far as the rows tell
        rate = made(**limits, lr_warmup_steps=4).learning_rate(Result(), 1.0, 0.0, "cosine")
        assert rate == pytest.approx(1 / min(4, most))
        assert made(**limits, lr_warmup_steps=0).learning_rate(Result(), 1.0, 0.0, "cosine") == 1.0
        assert 0 <= made(**limits, lr_warmup_fraction=0.5).learning_rate(Result(), 1.0, 0.0, "cosine") <= 2 / 13


def test_the_limit_that_comes_first():
    plan = made(max_time=40.0, max_steps=20, lr_warmup_steps=2)
    for seconds in (0.1, 1.0):  # a step: 20 of them come before 40 seconds
        rates = [plan.learning_rate(after(k, seconds * k), 1.0, 0.0, "cosine") for k in range(20)]
        assert rates == pytest.approx([learning_rate(k, 13, 2, 1.0, 0.0) for k in range(20)])  # epochs end it at 13
    assert plan.position(after(5, 5)) == "step 5/13" and plan.fraction_done(after(5, 5)) == pytest.approx(5 / 13)
    assert plan.position(after(5, 30)) == "step 5 (75%)"
    assert not plan.is_done(after(12, 39.9)) and plan.is_done(after(13, 1.0)) and plan.is_done(after(1, 40.0))


def test_a_run_of_steps_is_as_it_was():
    """Bit for bit."""
    plan = made(max_steps=10, lr_warmup_steps=3)
    expected = [learning_rate(k, 10, 3, 0.01, 0.001) for k in range(10)]
    assert [plan.learning_rate(after(k, 3.7 * k), 0.01, 0.001, "cosine") for k in range(10)] == expected
    assert expected[:3] == [0.01 * 1 / 3, 0.01 * 2 / 3, 0.01]


def test_accumulation_instead_of_the_size():
    train = TrainArgs(micro_batch_size=3, gradient_accumulation_iters=4)  # 16, the default, is no multiple of 3
    assert train.on(1).global_batch_size == 12 and train.on(2).global_batch_size == 24
    assert TrainArgs().on(2).global_batch_size == 16


@pytest.mark.parametrize(
    ("size", "micro", "devices", "becomes"), [(8, 4, 4, 2), (24, 6, 2, 6), (24, 8, 2, 4), (8, 8, 8, 1)]
)
def test_micro_batches_fit_the_share_of_a_device(size, micro, devices, becomes, capsys):
    train = TrainArgs(global_batch_size=size, micro_batch_size=micro).on(devices)
    assert (train.global_batch_size, train.micro_batch_size) == (size, becomes)
    assert (f"micro_batch_size {becomes} instead of {micro}" in capsys.readouterr().err) == (micro != becomes)


def test_a_step_that_devices_cannot_share():
    with pytest.raises(UserError, match=r"global_batch_size 9 is not a multiple of .* on 2 devices; use 8 or 10"):
        TrainArgs(global_batch_size=9).on(2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (dict(gradient_accumulation_iters=0), "--train.gradient_accumulation_iters 0 must be above 0"),
        (dict(lr_decay_iters=0), "--train.lr_decay_iters 0 must be above 0"),
        (dict(learning_rate=-1.0), "--train.learning_rate -1.0 is below 0"),
        (dict(learning_rate=math.nan), "--train.learning_rate nan is below 0"),
        (dict(epochs=None), "--train.max_time"),
    ],
)
def test_what_cannot_be(train, message):
    with pytest.raises(UserError, match=message):
        TrainArgs(**train).check()


@pytest.fixture
def finetune(llama, tmp_path, capsys):
    """Run the command; the lines of its metrics file, and what it printed."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.json").write_text(json.dumps(make_rows(30)))
    (tmp_path / "rows" / "val.json").write_text(json.dumps(make_rows(4, seed=1)))

    def run(name: str, *flags: object) -> tuple[list[dict[str, str]], str]:
        words = ["--data", "JSON", "--data.json_path", tmp_path / "rows", "--out_dir", tmp_path / name,
                 "--precision", "32-true", "--accelerator", "cpu", "--eval.max_new_tokens", "null",
                 "--train.micro_batch_size", 4, "--train.global_batch_size", 4]  # fmt: skip
        capsys.readouterr()
        main(["finetune", "lora", str(llama), *map(str, [*words, *flags])])
        return read_metrics(tmp_path / name), capsys.readouterr().out

    return run


def test_rates_of_a_run(finetune):
    flags = ["--train.max_steps", 6, "--train.lr_warmup_steps", 2, "--train.lr_decay_iters", 4,
             "--train.lr_schedule", "linear", "--train.learning_rate", 0.01, "--train.min_lr", 0.001]  # fmt: skip
    metrics, printed = finetune("out", *flags)
    rates = [float(m["lr"]) for m in metrics if m["lr"]]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0055, 0.001, 0.001])
    assert "AdamW, 2 warmup steps, learning rate 0.01, linear to 0.001 at step 4" in printed


def test_accumulation_gives_the_same_run(finetune):
    common = ["--train.max_steps", 3, "--lora_dropout", 0, "--train.lr_warmup_steps", 0]
    one, _ = finetune("one", *common, "--train.global_batch_size", 12)
    two, printed = finetune("two", *common, "--train.global_batch_size", 12, "--train.gradient_accumulation_iters", 3)
    assert losses(one) == losses(two) and "3 steps of 12 rows" in printed


def test_early_stopping(finetune, tmp_path):
    # a learning rate of 0: no validation is better than the first
    flags = ["--train.max_steps", 20, "--train.epochs", 20, "--optimizer.lr", 0, "--eval.interval", 2,
             "--eval.early_stopping_patience", 2, "--train.save_interval", 2]  # fmt: skip
    metrics, printed = finetune("stopped", *flags)
    assert "Stopping early" in printed
    assert "after 2 validations in a row" in printed
    assert [int(m["step"]) for m in metrics if m["val_loss"]] == [0, 2, 4, 6, 6]  # the last is the final one
    assert len(losses(metrics)) == 6 and (tmp_path / "stopped" / "final").is_dir()
    assert {p.name for p in (tmp_path / "stopped").glob("step-*")} == {f"step-00000{n}" for n in (2, 4, 6)}


def test_a_run_that_gets_better_does_not_stop(finetune):
    flags = ["--train.max_steps", 8, "--train.epochs", 20, "--optimizer.lr", 0.01, "--train.lr_warmup_steps", 0]
    metrics, printed = finetune("whole", *flags, "--eval.interval", 2, "--eval.early_stopping_patience", 1)
    assert len(losses(metrics)) == 8 and "Stopping early" not in printed


# a run that time ends, by a clock that shows how often it was looked at


@pytest.fixture
def clock(monkeypatch):
    """Every step takes a second."""
    seconds = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))


TIMED = ["--train.epochs", "null", "--train.lr_warmup_fraction", 0.2, "--train.min_lr", 0.001, "--optimizer.lr", 0.01,
         "--lora_dropout", 0, "--eval.interval", 100, "--train.save_interval", 100]  # fmt: skip


@pytest.mark.parametrize("flags", [["--train.max_time", 10], ["--train.max_time", 10, "--train.max_tokens", 10**6]])
def test_a_run_that_time_ends(flags, finetune, clock, tmp_path):
    metrics, printed = finetune("timed", *TIMED, *flags)
    rates = [float(m["lr"]) for m in metrics if m["lr"]]
    assert rates[1:] == pytest.approx([learning_rate(k, 10, 2, 0.01, 0.001) for k in range(1, 10)])
    assert [m["seconds"] for m in metrics if m["lr"]] == [f"{float(k)}" for k in range(1, 11)]
    assert "0:00:10 of training" in printed and "warmup over 20% of the run" in printed and "at the end" in printed
    assert "step 3 (30%) | loss" in printed and "step 10 (100%)" in printed and "000,000 steps" not in printed
    assert not set(re.findall(r"(\d+:\d\d:\d\d) left", printed)) - {"0:00:00", "0:00:01", "0:00:02", "0:00:03"}


def test_it_is_resumed_at_the_share_that_was_used(finetune, clock, tmp_path):
    whole, _ = finetune("whole", *TIMED, "--train.max_time", 10)
    for more in ([], ["--resume", "true"]):
        with pytest.raises(SystemExit):
            finetune("parts", *TIMED, "--train.max_time", 10, "--train.pause_after", 4, *more)
    parts, _ = finetune("parts", *TIMED, "--train.max_time", 10, "--resume", "true")
    assert [(m["step"], m["lr"], m["loss"]) for m in parts] == [(m["step"], m["lr"], m["loss"]) for m in whole]


def test_the_first_ranks_clock_counts(finetune, clock, monkeypatch):
    """It goes at half of this one's speed."""
    monkeypatch.setattr(one_device.OneDevice, "broadcast", lambda self, value: value - 0.5 if value else value)
    metrics, _ = finetune("out", *TIMED, "--train.max_time", 5)
    rates = [float(m["lr"]) for m in metrics if m["lr"]]
    assert rates[1:] == pytest.approx([learning_rate(k, 10, 2, 0.01, 0.001) for k in range(1, 10)])


def test_a_run_that_tokens_end(finetune, tmp_path):
    """Rows of many lengths: the rates follow the tokens, and the run reads all of them."""
    flags = ["--train.max_tokens", 1500, "--train.lr_schedule", "linear", *TIMED]
    metrics, printed = finetune("tokens", *flags)
    steps = [(float(m["lr"]), int(m["tokens"])) for m in metrics if m["lr"]]
    assert steps[-1][1] >= 1500 > steps[-2][1]
    for number, ((_, used), (rate, _)) in enumerate(itertools.pairwise(steps), start=1):
        share = used / 1500
        warm = min(1.0, (number + 1) / number * share / 0.2)
        expected = 0.01 * warm if share < 0.2 else 0.001 + 0.009 * (1 - share) / 0.8
        assert rate == pytest.approx(expected)
    assert "1,500 tokens, steps of 4 rows" in printed
