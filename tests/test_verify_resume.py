"""`litgpt verify-resume` finds a difference where there is one, and only there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.__main__ import main
from litgpt.commands import verify_resume
from litgpt.commands.verify_resume import first_difference
from tests.runs import METHODS


def options(rows_file: Path) -> list[str]:
    return [*f"--data JSON --data.json_path {rows_file} --data.val_split_fraction 0.1 --eval.interval 2".split(),
            *"--train.global_batch_size 8 --train.micro_batch_size 4 --accelerator cpu".split()]  # fmt: skip


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs in this process; the words of each."""
    calls: list[list[str]] = []

    class Done:
        def __init__(self, command: list[str], **more: object) -> None:
            calls.append(command[3:])
            self.returncode, self.stderr = 0, "litgpt: error: what is wrong\n"
            try:
                main(command[3:])
            except SystemExit as e:
                self.returncode = int(e.code or 0)

    monkeypatch.setattr(verify_resume.subprocess, "run", Done)
    return calls


@pytest.mark.parametrize("name", ["verify-resume", "verify_resume"])
def test_no_difference(name, inside, base, rows_file, capsys):
    flags = METHODS["dora"] if name == "verify_resume" else []
    model = [flags[0], str(base), *flags[1:]] if flags else [str(base)]
    main([name, "--steps", "2", *model, *options(rows_file)])
    assert "No difference" in capsys.readouterr().out
    assert len(inside) == 3 and all(words[:3] == ["finetune", "lora", str(base)] for words in inside)
    assert not Path(inside[0][inside[0].index("--out_dir") + 1]).parent.exists()


def test_a_difference_is_found(inside, base, rows_file, monkeypatch, capsys):
    """Without the random states, dropout draws otherwise after the stop."""
    monkeypatch.setattr("litgpt.train.resume.save.set_random_state", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        main(["verify-resume", str(base), *options(rows_file), "--steps=2", "--lora_dropout", "0.5"])
    assert stop.value.code == 1
    assert "Step 3: loss is " in capsys.readouterr().out


def test_what_goes_wrong_is_told(inside, base, rows_file, capsys):
    for words, message in (
        (["verify-resume"], "Missing: the model and the options of a finetune."),
        (["verify-resume", "x", "--steps", "0"], "--steps 0 must be above 0."),
        (["verify-resume", "full", "nowhere"], "The finetune failed: what is wrong"),
        (["verify-resume", str(base), *options(rows_file), "--train.max_tokens", "10"], "lower --steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and message in error


def test_weights_are_compared_bit_by_bit(tmp_path):
    header = "step,loss,seconds\n1,2.5,"
    for name in "ab":
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "metrics.csv").write_text(f"{header}{name}\n")
        save_file(
            {"w": torch.zeros(2, 3), "nan": torch.tensor([torch.nan])}, tmp_path / name / "final" / "m.safetensors"
        )
    a, b = tmp_path / "a", tmp_path / "b"
    assert first_difference(a, b) is None
    weights = load_file(b / "final" / "m.safetensors")
    weights["w"][1, 2] = 1e-30
    save_file(weights, b / "final" / "m.safetensors")
    assert first_difference(a, b) == "w[1, 2]: 0.0 without a stop, 1.0000000031710769e-30 with one."
    (b / "metrics.csv").write_text("step,loss,seconds\n1,2.25,0\n")
    assert first_difference(a, b) == "Step 1: loss is 2.5 without a stop, 2.25 with one."
    (b / "metrics.csv").write_text("step,loss,seconds\n")
    assert first_difference(a, b) == "metrics.csv has 1 lines without a stop, 0 with one."
