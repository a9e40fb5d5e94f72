"""The learning rate over a run, and where a run ends."""

import itertools
import json
import math

import pytest
import torch

from litgpt.__main__ import main
from litgpt.args import TrainArgs
from litgpt.errors import UserError
from litgpt.train.loop import Plan
from litgpt.train.schedule import learning_rate
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
        (dict(max_tokens=33, lr_warmup_steps=0), (3, 0, 3, None)),
        (dict(max_steps=10, epochs=50, lr_warmup_fraction=0.2), (10, 2, 10, None)),
        (dict(max_steps=10, epochs=50, lr_warmup_steps=2, lr_decay_iters=6), (10, 2, 6, None)),
        (dict(max_steps=10, epochs=50, lr_warmup_steps=2, lr_decay_iters=60), (10, 2, 60, None)),
        (dict(max_steps=20, epochs=50, lr_warmup_steps=15, lr_decay_iters=10), (20, 1, 10, 15)),
        (dict(max_steps=20, epochs=50, lr_warmup_steps=21), (20, 2, 20, 21)),
    ],
)
def test_plan(train, plan):
    made = Plan.make(TrainArgs(global_batch_size=4, **train), Rows())  # type: ignore[arg-type]
    assert (made.steps, made.warmup, made.decay, made.cut_warmup) == plan


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
    assert (f"micro_batch_size {micro} is {becomes} here" in capsys.readouterr().err) == (micro != becomes)


def test_a_step_that_devices_cannot_share():
    with pytest.raises(UserError, match=r"global_batch_size 9 is no multiple of .* on 2 devices; 8 or 10 would do"):
        TrainArgs(global_batch_size=9).on(2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (dict(gradient_accumulation_iters=0), "--train.gradient_accumulation_iters 0 must be above 0"),
        (dict(lr_decay_iters=0), "--train.lr_decay_iters 0 must be above 0"),
        (dict(learning_rate=-1.0), "--train.learning_rate -1.0 is below 0"),
        (dict(learning_rate=math.nan), "--train.learning_rate nan is below 0"),
        (
            dict(epochs=None, max_time=3.0, lr_warmup_fraction=0.1),
            "--train.lr_warmup_fraction wants to know the length",
        ),
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
    assert "AdamW, 2 steps of warm-up, learning rate 0.01, linear to 0.001 at step 4" in printed


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
    assert "The run stops here: 2 validations without a loss below" in printed
    assert "after 2 validations in turn without a new best" in printed
    assert [int(m["step"]) for m in metrics if m["val_loss"]] == [0, 2, 4, 6, 6]  # the last is the final one
    assert len(losses(metrics)) == 6 and (tmp_path / "stopped" / "final").is_dir()
    assert {p.name for p in (tmp_path / "stopped").glob("step-*")} == {"step-000002", "step-000004"}


def test_a_run_that_gets_better_does_not_stop(finetune):
    flags = ["--train.max_steps", 8, "--train.epochs", 20, "--optimizer.lr", 0.01, "--train.lr_warmup_steps", 0]
    metrics, printed = finetune("whole", *flags, "--eval.interval", 2, "--eval.early_stopping_patience", 1)
    assert len(losses(metrics)) == 8 and "stops here" not in printed
