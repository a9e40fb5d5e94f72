"""The screen of `litgpt doctor`: what works is tried, and no secret is in it."""

import os
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from litgpt.__main__ import main
from litgpt.commands import doctor

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_one_screen_without_secrets(capsys, monkeypatch, tmp_path):
    secrets = {
        "HF_TOKEN": "hf_SECRET",
        "WANDB_API_KEY": "SECRET",
        "HTTPS_PROXY": "http://me:SECRET@proxy",
        "HF_ENDPOINT": "https://me:SECRET@mirror",
        "CUDA_VISIBLE_DEVICES": "SECRET with a blank",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(Path, "home", lambda: Path(doctor.__file__).parents[2])
    main(["doctor", str(tmp_path / "not" / "there")])
    screen = capsys.readouterr().out
    assert "SECRET" not in screen
    assert all(f"{name} is set" in screen for name in secrets)
    assert "OMP_NUM_THREADS=1" in screen
    assert re.search(r"^litgpt +\S+, in ~/litgpt$", screen, re.MULTILINE), screen
    assert str(Path(doctor.__file__).parents[2]) not in screen
    assert re.search(r"^on cpu .*32-true", screen, re.MULTILINE)
    assert re.search(r"[\d.]+ GB free for ", screen)
    assert len(screen.splitlines()) <= 40


def test_what_fails_is_said(capsys, monkeypatch):
    def step(precision, device):
        if precision != "16-true":
            raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(doctor, "train_a_step", step)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    screen = capsys.readouterr().out
    assert "not 32-true" in screen and "no such kernel" in screen and "long story" not in screen
    assert "; 16-true;" in screen
    assert "PROBLEM: a training step fails on cpu" in screen


def test_precisions_are_tried():
    import torch

    assert doctor.tried(doctor.train_a_step, "32-true", torch.device("cpu")) is None
    with torch.device("cpu"):
        assert doctor.tried(doctor.quantized_product, "bnb.nf4", torch.device("cpu")) is None
    assert doctor.tried(doctor.train_a_step, "32-true", torch.device("meta"))


def test_every_extra_is_explained():
    text = PYPROJECT.read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) =", table, re.MULTILINE)
    assert set(doctor.EXTRAS) == set(extras) - {"extra", "test"}


def test_too_old_and_missing_packages():
    assert doctor.lacking(Requirement("torch>=2.0")) == ""
    assert "torch is " in doctor.lacking(Requirement("torch>=99"))
    assert "not installed" in doctor.lacking(Requirement("no-such-package-at-all>=1"))


@pytest.mark.skipif(os.name == "nt", reason="the home folder is found in another way")
@pytest.mark.parametrize("command", ["doctor", "recipes", "generate", "validate", "data_check", "finetune", "download"])
def test_without_a_home(command, base, rows_file, tmp_path, capsys, monkeypatch):
    """As `env -u HOME` for a user that the system does not know."""

    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "LITGPT_CACHE", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    rows = ["--data", "JSON", "--data.json_path", rows_file, "--data.prompt_style", "alpaca"]
    more = {
        **{"generate": [base, "--max_new_tokens", 1], "validate": [base], "data_check": [base, *rows]},
        "finetune": [base, *rows, "--train.max_steps", 1, "--accelerator", "cpu", "--out_dir", tmp_path / "out"],
        "download": ["list"],
    }
    main([command, *map(str, more.get(command, []))])
    assert capsys.readouterr().out
