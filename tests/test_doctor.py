"""The screen of `litgpt doctor`: what works is tried, and no secret is in it."""

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
