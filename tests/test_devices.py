"""Two processes give the loss curve of one."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest


def run(llama: Path, rows_file: Path, out: Path, devices: int) -> list[float]:
    words = ["finetune", "lora", llama, "--data", "JSON", "--data.json_path", rows_file, "--out_dir", out,
             "--precision", "32-true", "--lora_dropout", 0, "--train.max_steps", 5, "--train.global_batch_size", 6,
             "--train.epochs", 10, "--eval.interval", 2, "--devices", devices, "--accelerator", "cpu"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "litgpt", *map(str, words)], check=True, capture_output=True, timeout=300)
    with open(out / "metrics.csv", newline="") as f:
        return [float(row["loss"] or row["val_loss"]) for row in csv.DictReader(f)]


def test_two_devices(llama, rows_file, tmp_path):
    one, two = (run(llama, rows_file, tmp_path / str(n), n) for n in (1, 2))
    assert len(one) == 9 and two == pytest.approx(one, abs=1e-4)
    assert {p.name for p in (tmp_path / "2" / "final").iterdir()} == {
        p.name for p in (tmp_path / "1" / "final").iterdir()
    }
