"""What a run picks if the options leave it to the run: learning rate, warmup, micro-batch, validations, checkpoints."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from litgpt.__main__ import main
from litgpt.cli.parser import parse
from litgpt.data.json_file import JSON
from litgpt.errors import UserError
from litgpt.finetune.full import setup
from litgpt.methods.lora import LoRA, lora_layers
from litgpt.model.gpt import GPT
from litgpt.storage.outputs import write_sums
from litgpt.train import learning_rate, loop, micro_batch
from litgpt.train.args import EvalArgs, TrainArgs
from litgpt.train.devices.one_device import OneDevice
from litgpt.train.learning_rate import default_learning_rate, takes_default
from litgpt.train.optimizers import Muon
from litgpt.train.resume.recorded import recorded as recorded_in_checkpoint
from litgpt.train.resume.save import Saver
from litgpt.train.resume.state import MICRO_BATCH, STATE
from litgpt.train.run import Run
from litgpt.train.schedule import Plan, Result
from tests.conftest import make_rows
from tests.families import FAMILIES
from tests.test_gpu_path import make_model
from tests.test_schedule import Rows, clock  # noqa: F401
from tests.test_training import losses, read_metrics

Metrics = list[dict[str, str]]


@pytest.fixture
def finetune(llama, tmp_path, capsys):
    """Run a finetune with few options; the lines of its metrics file, and what it printed."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.json").write_text(json.dumps(make_rows(32)))
    (tmp_path / "rows" / "val.json").write_text(json.dumps(make_rows(6, seed=1)))

    def run(name: str, *flags: object, method: str = "lora", code: int = 0) -> tuple[Metrics, str]:
        words = ["--data", tmp_path / "rows", "--out_dir", tmp_path / name, "--precision", "32-true"]
        words += ["--accelerator", "cpu", "--eval.max_new_tokens", "null"]
        capsys.readouterr()
        found = 0
        try:
            main(["finetune", method, str(llama), *map(str, [*words, *flags])])
        except SystemExit as e:
            found = int(e.code or 0)
        printed = "".join(capsys.readouterr())
        assert found == code, printed
        return read_metrics(tmp_path / name) if (tmp_path / name / "metrics.csv").is_file() else [], printed

    return run


def numbers(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    return [(m["step"], m["loss"], m["lr"], m["val_loss"]) for m in metrics]


def recorded(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "hyperparameters.yaml").read_text())


# the learning rate


@pytest.mark.parametrize(
    ("method", "width", "rate"),
    [
        ("full", 64, 2.0e-3),
        ("full", 128, 1.4e-3),
        ("full", 4096, 7.6e-6),
        ("lora", 128, 8.6e-3),
        ("lora", 4096, 1.3e-4),
    ],
)
def test_the_rule(method, width, rate):
    assert default_learning_rate(method, width) == rate


@pytest.mark.parametrize("method", learning_rate.RULES)
def test_rates_fall_with_the_width_within_their_limits(method):
    rates = [default_learning_rate(method, 2**n) for n in range(2, 18)]
    rule = learning_rate.RULES[method]
    assert rates == sorted(rates, reverse=True) and rates[0] <= rule.highest and rates[-1] >= rule.lowest
    assert all(float(f"{rate:.1e}") == rate for rate in rates)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.AdamW, True),
        (torch.optim.NAdam, True),
        (partial(torch.optim.AdamW, weight_decay=0.1), True),
        (partial(torch.optim.AdamW, lr=1e-3), False),
        (partial(partial(torch.optim.AdamW, lr=1e-3), eps=1e-6), False),
        (lambda params: torch.optim.AdamW(params), False),
        (torch.optim.SGD, False),
        (Muon, False),
    ],
)
def test_which_optimizers_take_it(optimizer, expected):
    assert takes_default(optimizer) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["--optimizer", "Adam", "--optimizer.weight_decay", "0.1"], True),
        (["--optimizer.lr", "null"], True),
        (["--optimizer.lr", "1e-3"], False),
        (["--train.learning_rate", "1e-3"], False),
        (["--optimizer", "SGD"], False),
    ],
)
def test_which_command_lines_take_it(words, expected):
    options = parse("litgpt.finetune.lora:setup", "finetune_lora", ["X", *words])
    assert takes_default(options.optimizer) == expected


def rates(metrics: Metrics) -> list[float]:
    return [float(m["lr"]) for m in metrics if m["lr"]]


CONSTANT = ["--train.max_steps", 2, "--train.lr_schedule", "constant"]


@pytest.mark.parametrize("method", ["lora", "full", "adapter", "adapter_v2"])
def test_the_rate_of_a_run(method, finetune, llama, tmp_path):
    flags = ["--adapter_start_layer", 0] if "adapter" in method else []
    metrics, printed = finetune("out", *CONSTANT, *flags, method=method)
    expected = default_learning_rate(method, 32)
    assert rates(metrics) == [expected] * 2
    words = f"learning rate {expected:g} (default of finetune {method} for width 32), constant"
    assert words in " ".join(printed.split())
    file = tmp_path / "out" / "final" / "hyperparameters.yaml"
    assert recorded(file.parent)["optimizer"]["init_args"]["lr"] == expected
    again, printed = finetune("again", "--config", file, "--out_dir", tmp_path / "again", method=method)
    assert numbers(again) == numbers(metrics) and "default of" not in printed


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        (["--optimizer.lr", 3e-4], 3e-4),
        (["--train.learning_rate", 3e-4], 3e-4),
        (["--optimizer", "SGD"], 1e-3),
        (["--optimizer.lr", 0], 0),
    ],
)
def test_other_rates_are_left_alone(flags, rate, finetune):
    metrics, printed = finetune("out", *CONSTANT, *flags)
    assert rates(metrics) == [rate] * 2 and "default of" not in printed


def test_pretraining_has_the_rate_of_the_optimizer(llama, finetune, tmp_path):
    words = ["--data", "TextFiles", "--data.train_data_path", tmp_path / "texts", "--train.max_steps", 2]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the quick brown fox " * 3000)
    words += ["--train.max_seq_length", 32, "--train.global_batch_size", 4, "--out_dir", tmp_path / "out"]
    words += ["--train.lr_schedule", "constant", "--accelerator", "cpu"]
    main(["pretrain", *map(str, ["--initial_checkpoint_dir", llama, *words])])
    assert rates(read_metrics(tmp_path / "out")) == [1e-3] * 2


def test_from_python(llama, finetune, tmp_path):
    common: dict[str, Any] = dict(data=JSON(str(tmp_path / "rows")), eval=EvalArgs(max_new_tokens=None))
    common |= dict(train=TrainArgs(max_steps=2, lr_schedule="constant"), accelerator="cpu", precision="32-true")
    setup(llama, tmp_path / "a", **common)
    setup(llama, tmp_path / "b", optimizer=partial(torch.optim.AdamW, lr=2e-3), **common)
    setup(llama, tmp_path / "c", optimizer=lambda params: torch.optim.AdamW(params), **common)
    found = [rates(read_metrics(tmp_path / name)) for name in "abc"]
    assert found == [[default_learning_rate("full", 32)] * 2, [2e-3] * 2, [1e-3] * 2]


# resuming


PAUSE = ["--train.pause_after", 3]


def test_a_resumed_run_has_what_was_picked(finetune, tmp_path, monkeypatch):
    """Also after the rules have changed, and where more would fit in memory."""
    flags = ["--train.max_steps", 8, "--train.save_best", "true"]
    with monkeypatch.context() as m:
        m.setattr(micro_batch, "memory_dry_run", only_fits(2))
        whole, _ = finetune("whole", *flags)
        finetune("out", *flags, *PAUSE, code=75)
    rule = learning_rate.Rule(1.0, -1.0, 1e-9, 1.0)
    monkeypatch.setattr(learning_rate, "RULES", {"lora": rule})
    out, printed = finetune("out", *flags, "--resume", "true")
    assert numbers(out) == numbers(whole)
    assert "micro-batch 2" in printed and "learning rate 0.02 (as recorded)" in printed
    assert "is finished" in finetune("out", *flags, "--resume", "true")[1]
    assert "was 0.02, is now 0.001" in finetune("out", *flags, "--resume", "true", "--optimizer.lr", 1e-3, code=2)[1]


def test_a_resumed_run_keeps_options_that_were_given(finetune, tmp_path):
    given = ["--train.micro_batch_size", 4, "--train.lr_warmup_steps", 2, "--eval.interval", 3, "--optimizer.lr", 3e-3]
    whole, _ = finetune("whole", "--train.max_steps", 8, *given)
    finetune("out", "--train.max_steps", 8, *given, *PAUSE, code=75)
    out, _ = finetune("out", "--train.max_steps", 8, "--resume", "true")
    assert numbers(out) == numbers(whole)


def test_a_checkpoint_of_an_earlier_release(finetune, tmp_path):
    """It goes on with the defaults of then, which the settings have, and with PyTorch's learning rate."""
    then = {"train.micro_batch_size": 1, "train.lr_warmup_steps": 5, "train.save_interval": 1000}
    then |= {"train.keep_last": "null", "eval.interval": 6, "optimizer.lr": 1e-3}
    flags = ["--train.max_steps", 8, "--train.epochs", 100, "--train.global_batch_size", 2]
    earlier = [w for name, value in then.items() for w in (f"--{name}", value)]
    whole, _ = finetune("whole", *flags, *earlier)
    finetune("out", *flags, *earlier, *PAUSE, code=75)
    checkpoint = tmp_path / "out" / "step-000003"
    state = torch.load(checkpoint / STATE, weights_only=True)
    del state["settings"][MICRO_BATCH], state["settings"]["optimizer.init_args.lr"]
    state["settings"]["optimizer.init_args"] = {}
    torch.save(state, checkpoint / STATE)
    write_sums(checkpoint, step=3)
    out, printed = finetune("out", *flags, "--resume", "true")
    assert numbers(out) == numbers(whole)
    assert "learning rate 0.001 (as recorded)" in printed and "micro-batch 1" in printed
    # one of a run from Python has no settings
    state["settings"] = {name: value for name, value in state["settings"].items() if " " in name}
    torch.save(state, checkpoint / STATE)
    run: Any = SimpleNamespace(checkpoint=checkpoint, method=SimpleNamespace(warmup_steps=100))
    settings, rate = recorded_in_checkpoint(run)
    assert (settings["train.lr_warmup_steps"], settings["train.micro_batch_size"], rate) == (100, 1, 1e-3)


# the micro-batch


@pytest.mark.parametrize(
    ("train", "devices", "largest", "sizes"),
    [
        ({}, 1, 8, [8, 4, 2, 1]),
        ({}, 1, None, [16, 8, 4, 2, 1]),
        ({}, 4, None, [4, 2, 1]),
        ({"global_batch_size": 18}, 1, 8, [6, 3, 2, 1]),
        ({"global_batch_size": 7}, 1, 4, [1]),
        ({"micro_batch_size": 4}, 1, 8, [4]),
        ({"gradient_accumulation_iters": 4}, 1, 8, [1]),
    ],
)
def test_sizes_to_try(train, devices, largest, sizes):
    assert TrainArgs(**train).micro_batch_sizes(devices, largest) == sizes


def only_fits(rows: int) -> Any:
    """A memory dry run that runs out of memory with more rows, after it has computed gradients."""
    real = micro_batch.memory_dry_run

    def run(fabric: Any, model: Any, optimizer: Any, batch: Any, times: int = 1) -> None:
        if len(batch.seqlens) > rows:
            with torch.random.fork_rng():
                model(batch).backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        real(fabric, model, optimizer, batch, times)

    return run


def test_it_steps_down_until_the_rows_fit(finetune, tmp_path, monkeypatch):
    flags = ["--train.max_steps", 4, "--train.epochs", 9, "--eval.max_iters", "null", "--lora_dropout", 0.3]
    expected, printed = finetune("given", *flags, "--train.micro_batch_size", 2)
    assert "micro-batch 2" in printed
    monkeypatch.setattr(micro_batch, "memory_dry_run", only_fits(3))
    metrics, printed = finetune("auto", *flags, "--train.pause_after", 2, code=75)
    assert "4 steps of 16 rows" in printed and "micro-batch 2" in printed
    settings = torch.load(tmp_path / "auto" / "step-000002" / STATE, weights_only=True)["settings"]
    assert settings[MICRO_BATCH] == 2 and settings["train.micro_batch_size"] == "auto"
    metrics, _ = finetune("auto", *flags, "--resume", "true")
    assert numbers(metrics) == numbers(expected)
    assert recorded(tmp_path / "auto" / "final")["train"]["micro_batch_size"] == "auto"


def test_nothing_fits(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "explain_memory", lambda self: None)  # its plan takes seconds
    monkeypatch.setattr(micro_batch, "memory_dry_run", only_fits(0))
    _, printed = finetune("out", "--train.max_steps", 4, code=2)
    assert "Out of memory in a micro-batch of " in printed and "in 1 rows" in printed
    assert "--train.micro_batch_size" not in printed and not (tmp_path / "out").exists()


def test_errors_of_other_kinds_end_the_search(finetune, monkeypatch):
    def wrong(*args: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(micro_batch, "memory_dry_run", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        finetune("out", "--train.max_steps", 4)


def test_a_device_that_runs_out_of_memory_decides_for_all(finetune, monkeypatch):
    """Another device, which has not enough for 8 rows and for 4."""
    answers = iter([1.0, 1.0])
    total = OneDevice.all_reduce
    monkeypatch.setattr(micro_batch, "sum_over_ranks", lambda fabric, x: total(fabric, x, "sum") + next(answers, 0.0))
    assert "micro-batch 2" in finetune("out", "--train.max_steps", 2)[1]


def test_the_result_does_not_depend_on_the_size(finetune):
    """Nor do the validations during the run, which then read the same rows."""
    flags = ["--train.max_steps", 6, "--train.epochs", 9, "--lora_dropout", 0, "--eval.max_iters", 3]
    one, _ = finetune("one", *flags, "--train.micro_batch_size", 1)
    auto, printed = finetune("auto", *flags)
    assert "micro-batch 8" in printed
    assert losses(auto) == pytest.approx(losses(one), abs=1e-5)
    a, b = ([float(m["val_loss"]) for m in run if m["val_loss"]] for run in (auto, one))
    assert len(a) == 7 and a == pytest.approx(b, abs=1e-5)


def test_packs_of_too_many_tokens_are_not_tried(finetune, monkeypatch):
    monkeypatch.setattr(micro_batch, "MOST_TOKENS", 512)
    assert "micro-batch 2" in finetune("out", "--train.max_steps", 2, "--train.pack", "true",
                                       "--train.max_seq_length", 250)[1]  # fmt: skip


def test_what_is_in_memory_when_a_size_is_tried(finetune, monkeypatch):
    """Two micro-batches, and as many bytes as AdamW's moments take."""
    made: list[tuple[int, int]] = []
    empty = torch.empty_like
    sizes: list[int] = []
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: sizes.append(x.numel()) or empty(x, **kwargs))
    real = micro_batch.memory_dry_run

    def run(fabric: Any, model: Any, optimizer: Any, batch: Any, times: int = 1) -> None:
        made.append((sum(sizes), times))
        real(fabric, model, optimizer, batch, times)

    monkeypatch.setattr(micro_batch, "memory_dry_run", run)
    _, printed = finetune("out", "--train.max_steps", 2)
    trained = int(printed.split("parameters")[1].split()[0].replace(",", ""))
    assert made == [(2 * trained, 2)]


def test_sharded_gpus_do_not_try(monkeypatch):
    """One row of 3 GB, 2 GB of weights, 40 GB that are free, 1 GB that torch keeps: 12 rows, so 8 of a step of 16."""
    monkeypatch.setattr(micro_batch, "dry_run", lambda run, size: None)
    stats = {"memory_allocated": 2, "max_memory_allocated": 5, "memory_reserved": 3}
    for name, gigabytes in stats.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, n=gigabytes: n * 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 10**9, 80 * 10**9))
    for least, size in ((100.0, 8), (5.0, 4), (0.5, 1)):
        fabric = SimpleNamespace(device=torch.device("cpu"), all_reduce=lambda x, reduce_op, n=least: x.clamp(max=n))
        run: Any = SimpleNamespace(fabric=fabric)
        assert micro_batch.likely_to_fit(run, [16, 8, 4, 2, 1]) == size


def test_accumulation_without_a_size_takes_rows_one_by_one(finetune):
    """The number of rows in a step must not depend on the memory."""
    _, printed = finetune("out", "--train.max_steps", 2, "--train.gradient_accumulation_iters", 3)
    assert "2 steps of 3 rows" in printed and "micro-batch 1" in printed


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--train.save_interval", "1"], ["--train.gradient_accumulation_iters", "4"]])
def test_a_plan(flags, finetune, llama, tmp_path, capsys):
    words = ["plan", "finetune", "lora", str(llama), "--data", str(tmp_path / "rows"), "--accelerator", "cpu"]
    main([*words, *flags])
    auto = capsys.readouterr().out
    main([*words, *flags, "--train.micro_batch_size", "1" if "4" in flags else "8"])
    assert auto.splitlines()[:6] == capsys.readouterr().out.splitlines()[:6]


# the warmup


@pytest.mark.parametrize(
    ("train", "most", "warmup"),
    [
        (dict(max_steps=46), 100, 4),
        (dict(max_steps=9), 100, 0),
        (dict(max_steps=5000), 100, 100),
        (dict(max_steps=5000), 2000, 500),
        (dict(max_steps=46, lr_warmup_steps=20), 100, 20),
        (dict(max_steps=50, lr_decay_iters=20), 100, 2),
        (dict(max_steps=46, lr_warmup_fraction=0.5), 100, 23),
        (dict(max_time=60.0, epochs=None), 100, 100),  # at most a tenth of the run, once its length is known
    ],
)
def test_warmup(train, most, warmup):
    plan = Plan(TrainArgs(**{"global_batch_size": 4, "epochs": 10**5, **train}), Rows(), most)  # type: ignore[arg-type]
    assert plan.warmup == warmup and plan.requested_warmup is None


# validations


@pytest.mark.parametrize("steps", [1, 5, 12, 25, 46, 100, 999])
def test_about_ten_validations(steps):
    plan = Plan(TrainArgs(max_steps=steps, epochs=10**6), Rows())
    result, found = Result(), []
    for step in range(1, steps):
        result.steps = step
        if plan.is_validation_due("auto", result):
            found.append(step)
            result.last_eval_step = step
    assert len(found) == steps - 1 if steps <= 10 else 5 <= len(found) <= 9  # and one after the last step
    assert len({b - a for a, b in zip([0, *found], found)}) <= 1


def test_validations_of_a_run(finetune):
    metrics, _ = finetune("out", "--train.max_steps", 22, "--train.epochs", 99, "--train.global_batch_size", 2)
    assert [int(m["step"]) for m in metrics if m["val_loss"]] == [0, 3, 6, 9, 12, 15, 18, 21, 22]


def test_validations_of_a_run_that_time_ends(finetune, clock):  # noqa: F811
    flags = ["--train.max_time", 40, "--train.epochs", "null", "--train.global_batch_size", 2]
    metrics, _ = finetune("out", *flags)
    assert [int(m["step"]) for m in metrics if m["val_loss"]] == [0, *range(4, 40, 4), 40]


def plan_of(steps: int) -> Plan:
    return Plan(TrainArgs(max_steps=steps, epochs=10**6), Rows())


@pytest.mark.parametrize(
    ("steps", "interval", "patience", "often", "less"),
    [
        (46, 100, 3, 11, None),
        (46, "auto", 9, 4, 8),  # a validation every 5 steps: 9 of them
        (46, "auto", 50, None, 8),
        (46, 10, 4, 9, 3),
        (2, "auto", 2, None, None),
    ],
)
def test_early_stopping_that_cannot_happen(steps, interval, patience, often, less):
    with pytest.raises(UserError) as error:
        plan_of(steps).check_patience(EvalArgs(interval=interval, early_stopping_patience=patience))
    message = str(error.value)
    assert f"--eval.early_stopping_patience {patience} " in message and f"{steps} steps" in message
    assert (f"--eval.interval {often} " in message) == (often is not None)
    assert (f"patience {less}." in message) == (less is not None)
    for remedy in ([dict(interval=often)] if often else []) + ([dict(early_stopping_patience=less)] if less else []):
        args: dict[str, Any] = dict(interval=interval, early_stopping_patience=patience) | remedy
        plan_of(steps).check_patience(EvalArgs(**args))


def test_early_stopping_that_can_happen():
    plan_of(46).check_patience(EvalArgs(early_stopping_patience=8))
    plan_of(46).check_patience(EvalArgs(interval=1, early_stopping_patience=44))
    Plan(TrainArgs(max_time=60.0, epochs=None), Rows()).check_patience(EvalArgs(early_stopping_patience=50))


def test_early_stopping_in_a_run(finetune, tmp_path):
    flags = ["--train.epochs", 20, "--optimizer.lr", 0]  # 40 steps, none of which is better than the first
    _, printed = finetune("out", *flags, "--eval.early_stopping_patience", 20, code=2)
    assert "--eval.interval 1 " in printed and not (tmp_path / "out").exists()
    metrics, printed = finetune("out", *flags, "--eval.early_stopping_patience", 3)
    assert "Stopping early" in printed and [m["step"] for m in metrics if m["val_loss"]][-2:] == ["16", "16"]


def test_a_resumed_run_may_have_a_patience_that_is_too_long(finetune, monkeypatch):
    """Earlier releases accepted it."""
    flags = ["--train.max_steps", 4, "--eval.interval", 100, "--eval.early_stopping_patience", 5]
    with monkeypatch.context() as m:
        m.setattr(Plan, "check_patience", lambda *args: None)
        finetune("out", *flags, *PAUSE, code=75)
    assert len(losses(finetune("out", *flags, "--resume", "true")[0])) == 4


# checkpoints


@pytest.mark.parametrize(
    ("seconds", "saved"),
    [
        (1, []),  # a run of less than a minute
        (10, list(range(7, 40, 7))),  # once a minute at most; a step decides before it runs
        (30, list(range(4, 40, 4))),  # every tenth
        (400, list(range(3, 40, 3))),  # after ten minutes
    ],
)
def test_when_checkpoints_are_saved(seconds, saved, finetune, tmp_path, monkeypatch):
    ticks = iter(range(0, 10**6, seconds))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    found: list[int] = []
    checkpoint = Saver.checkpoint
    monkeypatch.setattr(
        Saver, "checkpoint", lambda self, name: found.append(self.result.steps) or checkpoint(self, name)
    )
    finetune("out", "--train.max_steps", 40, "--train.epochs", 99, "--train.global_batch_size", 2)
    assert found == [*saved, 40]  # and the last state, which an extension needs
    assert [path.name for path in (tmp_path / "out").glob("step-*")] == ["step-000040"]


@pytest.mark.parametrize(
    ("train", "kept"),
    [
        ({}, 1),
        ({"save_interval": 5}, None),
        ({"keep_last": None}, None),
        ({"keep_last": 3}, 3),
        ({"save_interval": 5, "keep_last": 2}, 2),
    ],
)
def test_how_many_checkpoints_are_kept(train, kept):
    assert TrainArgs(**train).kept_checkpoints == kept


# no example; all linear layers


def test_no_example(finetune, capsys):
    flags = ["--train.max_steps", 2, "--eval.max_new_tokens", 4, "--eval.exact_match", 2]
    printed = finetune("a", *flags, "--eval.evaluate_example", "null")[1]
    assert "example, " not in printed and "exact answers, after: " in printed
    assert "example, after" in finetune("b", *flags)[1]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "mixtral", "phi3", "granite"])
def test_all_linear_layers(family):
    switches = dict.fromkeys(("query", "key", "value", "projection", "mlp"), True)
    found, expected = (
        lora_layers(make_model(family, method=lora))
        for lora in (LoRA(targets="all-linear"), LoRA(**switches))  # type: ignore[arg-type]
    )
    assert family in FAMILIES and found.keys() == expected.keys()
    assert all(layer.adapted == expected[name].adapted for name, layer in found.items())
    model: GPT = make_model(family, method=LoRA(targets="all-linear"))
    assert not [name for name in lora_layers(model) if "lm_head" in name]


def test_all_linear_layers_of_some_blocks(finetune, tmp_path):
    finetune("out", "--train.max_steps", 1, "--lora_targets", "all-linear", "--lora_layers", "[1]")
    config = json.loads((tmp_path / "out" / "final" / "adapter_config.json").read_text())
    names = str(config["target_modules"])
    assert all(name in names for name in ("q_proj", "k_proj", "o_proj", "down_proj")) and "lm_head" not in names


def test_a_rate_is_finite():
    assert all(math.isfinite(default_learning_rate(method, 1)) for method in learning_rate.RULES)
