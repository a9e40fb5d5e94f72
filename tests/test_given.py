"""What was given to whom: the optimizer and its options, the learning rate, the size of a step."""

import sys
from typing import Any

import pytest
import yaml

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.methods.quantize import bitsandbytes
from litgpt.train.args import TrainArgs
from tests.runs import lines
from tests.test_cli import LORA

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0002, "weight_decay": 0.1, "betas": [0.9, 0.95]}}


@pytest.mark.parametrize("name", ["SGD", "torch.optim.SGD", '{"class_path": "SGD"}', "{class_path: torch.optim.SGD}"])
def test_optimizer_by_name(settings, config, name):
    expected = settings(*LORA, "X", "--optimizer", "SGD")["optimizer"]
    assert (
        expected["class_path"] == "torch.optim.SGD" and expected["init_args"]["weight_decay"] == 0.0
    )  # AdamW's is 0.01
    assert settings(*LORA, "X", "--optimizer", name)["optimizer"] == expected
    assert (
        settings(*LORA, "X", "--optimizer.class_path", name.strip('{}"').split()[-1].strip('"'))["optimizer"]
        == expected
    )
    file = config("c.yaml", optimizer=yaml.safe_load(name))
    assert settings(*LORA, "X", "--config", file)["optimizer"] == expected and not settings.err


def test_an_argument_alone_keeps_the_class(settings, config):
    for words in (
        ["--optimizer.lr", "1e-3"],
        ["--optimizer.init_args.lr", "1e-3"],
        ["--optimizer.init_args", "{lr: 1e-3}"],
    ):
        assert settings(*LORA, "X", *words)["optimizer"]["init_args"]["lr"] == 0.001
    for given in ({"lr": 0.5}, {"init_args": {"lr": "5e-1"}}):
        got = settings(*LORA, "X", "--config", config("c.yaml", optimizer=given))["optimizer"]
        assert got["class_path"] == "torch.optim.AdamW" and got["init_args"]["lr"] == 0.5


def test_another_class_takes_what_was_given_and_it_knows(settings, config):
    file = config("c.yaml", optimizer=ADAMW)
    got = settings(*LORA, "X", "--config", file, "--optimizer", "SGD", "--optimizer.momentum", 0.9)["optimizer"]
    arguments = got["init_args"]
    assert (arguments["lr"], arguments["weight_decay"], arguments["momentum"]) == (0.0002, 0.1, 0.9)
    assert "betas" not in arguments
    assert settings.err.count("\n") == 1
    assert "SGD keeps lr 0.0002, weight_decay 0.1 and does not take betas" in settings.err
    again = settings(*LORA, "X", "--config", file, "--optimizer", "AdamW")["optimizer"]["init_args"]
    assert again["betas"] == [0.9, 0.95] and not settings.err


def test_a_second_file_with_another_class(settings, config):
    files = ["--config", config("1.yaml", optimizer=ADAMW), "--config", config("2.yaml", optimizer="Muon")]
    got = settings(*LORA, "X", *files)["optimizer"]
    assert got["class_path"] == "litgpt.train.optimizers.Muon"
    assert got["init_args"]["betas"] == [0.9, 0.95] and got["init_args"]["momentum"] == 0.95
    assert f"litgpt: {files[3]}: --optimizer Muon keeps" in settings.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "AdanW"], "--optimizer AdanW: no such optimizer. Did you mean 'AdamW'?"),
        (["--optimizer", "torch.optim.Adamw"], "Did you mean 'torch.optim.AdamW'?"),
        (["--optimizer", "xyz"], "Choose from Adadelta, Adafactor"),
        (["--optimizer", "json.JSONDecoder"], "no such optimizer"),
        (["--optimizer", "torch.optim.LBFGS"], "--optimizer torch.optim.LBFGS"),
        (["--optimizer", "SGD", "--optimizer.betas", "[0.9, 0.95]"], "Unknown option --optimizer.betas"),
        (["--optimizer.lr", "fast"], "--optimizer.lr fast: expected a number"),
        (["--train.learning_rate", "fast"], "--train.learning_rate fast: expected a number"),
        (["--train.learning_rate", "fast", "--optimizer.lr", "1"], "contradict each other"),
        (["--optimizer", "{class_path: SGD, init_args: 3}"], "optimizer.init_args is 3"),
        (["--optimizer", "{class_path: ["], "is not YAML"),
        (["--optimizer.init_args", "0.1"], "--optimizer.init_args is 0.1"),
        (["--train.lr_schedule", "cosin"], "expected cosine, linear or constant. Did you mean 'cosine'?"),
    ],
)
def test_what_is_no_optimizer(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([*LORA, "X", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_bitsandbytes_is_an_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    bitsandbytes.cache_clear()  # another test may have imported it
    with pytest.raises(SystemExit):
        main([*LORA, "X", "--optimizer", "PagedAdamW8bit"])
    assert "pip install '.[quantize]'" in capsys.readouterr().err


@pytest.mark.parametrize("case", range(16))
def test_learning_rate_from_everywhere(settings, config, capsys, case):
    """All combinations of where `learning_rate` and the optimizer's `lr` stand."""
    flag_rate, flag_lr, file_rate, file_lr = (bool(case & bit) for bit in (1, 2, 4, 8))
    fields: dict[str, Any] = {"train": {"learning_rate": 0.3}} if file_rate else {}
    fields |= {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.4}}} if file_lr else {}
    words = ["--train.learning_rate", 0.1] * flag_rate + ["--optimizer.lr", 0.2] * flag_lr
    words += ["--config", config("c.yaml", lora_r=4, **fields)]
    if flag_rate and flag_lr:
        with pytest.raises(SystemExit) as stop:
            main([*LORA, "X", *map(str, words)])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert "--train.learning_rate 0.1 and --optimizer.lr 0.2 contradict" in error
        return
    order = ((flag_rate, 0.1), (flag_lr, 0.2), (file_rate, 0.3), (file_lr, 0.4))
    expected = next((value for given, value in order if given), None)
    got = settings(*LORA, "X", *words)
    assert got["optimizer"]["init_args"].get("lr") == expected
    assert got["train"]["learning_rate"] in ((expected,) if flag_rate or file_rate else (None,))
    said = "train.learning_rate 0.3 takes precedence over optimizer.lr 0.4" in settings.err
    assert said == (file_rate and file_lr)


def test_learning_rate_more(settings, config):
    def rate(*words: object) -> tuple[Any, Any]:
        got = settings(*LORA, "X", *words)
        return got["train"]["learning_rate"], got["optimizer"]["init_args"].get("lr")

    assert rate("--train.learning_rate", "1e-4", "--optimizer.lr", 0.0001) == (1e-4, 1e-4)  # they agree
    assert rate("--learning_rate", "1e-4") == (1e-4, 1e-4)  # its old place
    assert rate("--train.learning_rate", 0.1, "--optimizer", "SGD") == (0.1, 0.1)
    one, two = config("1.yaml", train={"learning_rate": 0.1}), config("2.yaml", optimizer=ADAMW)
    assert rate("--config", one, "--config", two) == (2e-4, 2e-4)
    assert rate("--config", two, "--config", one) == (0.1, 0.1)
    assert rate("--config", one, "--train.learning_rate", "null") == (None, None)
    flat = config("3.yaml", learning_rate="5e-5", min_lr="1e-6")
    assert rate("--config", flat) == (5e-5, 5e-5)


def test_size_of_a_step(settings, config, capsys):
    def size(*words: object) -> tuple[Any, Any]:
        got = settings(*LORA, "X", *words)["train"]
        return got["gradient_accumulation_iters"], got["global_batch_size"]

    times = config("1.yaml", train={"gradient_accumulation_iters": 4})
    rows = config("2.yaml", train={"global_batch_size": 8})
    both = config("3.yaml", train={"gradient_accumulation_iters": 4, "global_batch_size": 8})
    assert size("--train.gradient_accumulation_iters", 4)[0] == size("--config", times)[0] == 4
    assert size("--config", times, "--train.global_batch_size", 8) == (None, 8)
    assert size("--config", rows, "--train.gradient_accumulation_iters", 4)[0] == 4
    assert size("--config", times, "--config", rows) == (None, 8)
    assert size("--config", both)[0] == 4 and "gradient_accumulation_iters 4 takes precedence over" in settings.err
    flags = ["--train.gradient_accumulation_iters", 4, "--train.global_batch_size"]
    assert size(*flags, 16, "--train.micro_batch_size", 2, "--devices", 2)[0] == 4
    for words in ([*flags, 16], [*flags, 4, "--devices", "auto"], [*flags, 4, "--devices", 2]):
        with pytest.raises(SystemExit) as stop:
            main([*LORA, "X", *map(str, words)])
        assert stop.value.code == 2 and "contradict each other" in capsys.readouterr().err


# pairs of which one excludes the other


@pytest.mark.parametrize("start", [LORA, ["finetune_full"], ["pretrain", "--model_name"], ["data_check"]])
@pytest.mark.parametrize(
    ("files", "flags", "steps", "fraction", "said"),
    [
        ([], [], "default", None, ""),
        ([], ["--train.lr_warmup_fraction", 0.1], None, 0.1, ""),  # beside the default of the other
        ([], ["--train.lr_warmup_steps", 5], 5, None, ""),
        ([{"lr_warmup_steps": 5}], ["--train.lr_warmup_fraction", 0.1], None, 0.1, ""),
        ([{"lr_warmup_fraction": 0.1}], ["--train.lr_warmup_steps", 5], 5, None, ""),
        ([{"lr_warmup_fraction": 0.1}, {"lr_warmup_steps": 5}], [], 5, None, ""),
        ([{"lr_warmup_steps": 5}, {"lr_warmup_fraction": 0.1}], [], None, 0.1, ""),
        ([{"lr_warmup_steps": None, "lr_warmup_fraction": 0.1}], [], None, 0.1, ""),
        ([{"lr_warmup_fraction": 0.1}], ["--train.lr_warmup_fraction", "null"], "default", None, ""),
        ([{"lr_warmup_steps": 5, "lr_warmup_fraction": 0.1}], [], None, 0.1, "lr_warmup_steps 5"),
    ],
)
def test_warmup_in_steps_or_as_a_share(start, files, flags, steps, fraction, said, settings, config):
    words = [w for i, f in enumerate(files) for w in ("--config", config(f"{i}.yaml", train=f))]
    train = settings(*start, "X", *words, *flags)["train"]
    assert (train["lr_warmup_steps"], train["lr_warmup_fraction"]) == (
        "auto" if steps == "default" else steps,
        fraction,
    )
    assert said in settings.err and settings.err.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("data", "flags", "mask", "on", "said"),
    [
        ({}, ["--data.train_on", "last"], True, "last", ""),
        ({}, ["--data.mask_prompt", "true"], True, None, ""),
        ({"mask_prompt": False}, ["--data.train_on", "assistant"], True, "assistant", ""),
        ({"mask_prompt": True}, ["--data.train_on", "all"], False, "all", ""),
        ({"train_on": "last"}, ["--data.mask_prompt", "false"], False, None, ""),
        ({"train_on": "last", "mask_prompt": True}, [], True, "last", ""),
        ({"train_on": "all", "mask_prompt": True}, [], False, "all", "mask_prompt True"),
        ({}, ["--data.train_on", "all", "--data.mask_prompt", "false"], False, "all", ""),
    ],
)
@pytest.mark.parametrize("name", ["JSON", "Alpaca"])  # of which one has a default for mask_prompt
def test_which_words_are_trained(name, data, flags, mask, on, said, settings, config):
    more = {"json_path": "x"} if name == "JSON" else {}
    file = config("c.yaml", data={"class_path": name, "init_args": {**more, **data}})
    got = settings(*LORA, "X", "--config", file, *flags)["data"]["init_args"]
    assert (got["mask_prompt"], got["train_on"]) == (mask, on)
    assert said in settings.err and settings.err.count("\n") == bool(said)


@pytest.mark.parametrize(
    "flags",
    [
        ["--train.lr_warmup_fraction", "0.1", "--train.lr_warmup_steps", "5"],
        ["--data", "JSON", "--data.json_path", "x", "--data.train_on", "all", "--data.mask_prompt", "true"],
        ["--data", "Alpaca", "--data.init_args.train_on", "last", "--data.init_args.mask_prompt=false"],
        ["--eval.exact_match", "3", "--eval.max_new_tokens", "null"],
    ],
)
def test_two_flags_of_which_one_would_win_in_silence(flags, llama, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*LORA, str(llama), "--out_dir", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert [flag for flag in flags if flag.startswith("--eval.") and flag not in error] == []
    names = [flag.partition("=")[0].rpartition(".")[2] for flag in flags if "." in flag and "json_path" not in flag]
    assert [name for name in names if not name[0].isdigit() and name not in error] == []


def test_two_of_a_kind_from_python():
    for wrong in ({"lr_warmup_steps": 5, "lr_warmup_fraction": 0.1}, {"lr_warmup_steps": 0, "lr_warmup_fraction": 0.0}):
        with pytest.raises(UserError, match="lr_warmup_fraction"):
            TrainArgs(**wrong).check()  # type: ignore[arg-type]
    TrainArgs(lr_warmup_fraction=0.1).check()
    TrainArgs(lr_warmup_fraction=0.1, lr_warmup_steps=None).check()


def test_settings_of_a_run_can_be_given_back(llama, rows_file, tmp_path, capsys):
    """hyperparameters.yaml holds all values, and none that would look like given twice."""
    words = [*LORA, str(llama), "--data", "JSON", "--data.json_path", str(rows_file), "--train.max_steps", "1",
             "--data.train_on", "last", "--train.lr_warmup_fraction", "0.5", "--lora_targets", "q_proj", "--lora_mlp",
             "true", "--train.lr_schedule", "constant", "--train.min_lr", "1e-5", "--train.lr_decay_iters", "3",
             "--eval.max_new_tokens", "null"]  # fmt: skip
    main([*words, "--out_dir", str(tmp_path / "a")])
    out, error = capsys.readouterr()
    assert "--lora_mlp true" in error and error.count("\n") == 1
    assert "--train.lr_schedule constant: --train.lr_decay_iters, --train.min_lr" in out
    main([*LORA, "--config", str(tmp_path / "a" / "final" / "hyperparameters.yaml"), "--out_dir", str(tmp_path / "b")])
    again = capsys.readouterr().err
    assert again == error
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
