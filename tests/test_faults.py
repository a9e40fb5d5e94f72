"""A run that cannot go on says why, in one line, and what was saved stays."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from litgpt.data.batches import Batch
from litgpt.errors import UserError
from litgpt.train import loop
from litgpt.train.args import TrainArgs
from litgpt.train.faults import in_words, is_out_of_memory, out_of_memory
from litgpt.train.resume.state import TrainingState, checkpoints, damage
from litgpt.train.run import Run
from tests.conftest import save_llama, some
from tests.runs import go, lines, same, start, words


def one_line(error: str) -> str:
    assert error.count("\n") == 1 and error.startswith("litgpt: error: "), error
    return error


# numbers that are not finite


def edited(base: Path, folder: Path, **changes: Any) -> Path:
    """The base with functions applied to some of its weights."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        full = next(key for key in weights if key.endswith(name.replace("__", ".") + ".weight"))
        change(weights[full])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["full", "lora", "nf4", "adapter-int8"])
def test_a_nan_in_one_weight(method, base, rows_file, tmp_path, capsys):
    if method in ("nf4", "adapter-int8"):
        pytest.importorskip("bitsandbytes")
    broken = edited(base, tmp_path / "base", layers__1__mlp__up_proj=lambda w: w[3, 5].fill_(torch.nan))
    out = tmp_path / "out"
    assert go(method, broken, rows_file, out) == 2
    error = one_line(capsys.readouterr().err)
    assert "Loss is NaN at step 1. " in error
    assert "not finite: transformer.h.1.mlp." in error
    report = json.loads((out / "crash" / "step-000001.json").read_text())
    assert report["step"] == 1 and len(report["rows"]) == 8
    assert not checkpoints(out) and not (out / "final").exists()


def overflow(base: Path, folder: Path, token: int) -> Path:
    """A model whose weights are all finite, and whose loss is not where one token is read: feature 0 of the stream is
    that token's alone, no layer adds to it, and the head makes more of it than float32 holds."""

    def only(w: torch.Tensor) -> None:
        w[:, 0] = 0
        w[token, 0] = 1000

    def head(w: torch.Tensor) -> None:
        w[:, 0] = 0
        w[7, 0] = 3e38

    def silent(w: torch.Tensor) -> None:
        w[0] = 0

    layers = {f"layers__{i}__{name}": silent for i in range(3) for name in ("self_attn__o_proj", "mlp__down_proj")}
    return edited(base, folder, embed_tokens=only, lm_head=head, **{"model__norm": lambda w: w[0].fill_(1)}, **layers)


@pytest.mark.parametrize("packs", [False, True], ids=["rows", "packs"])
def test_a_row_whose_loss_is_infinite(packs, base, whole, rows_file, tmp_path, capsys):
    """One row of 36 has the token that overflows. The run ends before its step; the checkpoint before it is good."""
    from litgpt.text.tokenizer import Tokenizer

    token = Tokenizer(base).encode("~")[-1]
    broken = overflow(base, tmp_path / "base", token)
    rows = json.loads(rows_file.read_text())
    rows[20]["output"] = "here it is: ~ and what follows"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--train.save_interval", 1, "--lora_dropout", 0, "--eval.initial_validation", "false", "--optimizer.lr", 0]
    flags += ["--train.lr_schedule", "constant"] + (["--train.pack", "true"] if packs else [])
    flags += ["--train.max_steps", 40] if packs else []
    out = tmp_path / "out"
    assert go("lora", broken, tmp_path / "rows.json", out, *flags) == 2
    error = one_line(capsys.readouterr().err)
    assert "1 of its " in error and "here it is: ~ and what follows" in error
    (crash,) = (out / "crash").glob("step-*.json")
    report = json.loads(crash.read_text())
    assert len(report["rows"]) == 1 and "~" in report["rows"][0]["text"] and not report["weights_not_finite"]
    step = report["step"]
    assert f"Loss is infinite at step {step}." in error or f"Loss is NaN at step {step}." in error
    assert str(crash) in error
    assert [damage(p) for p in checkpoints(out)] == [None] * (step - 1)
    assert int(lines(out)[-1]["step"]) == step - 1 if step > 1 else True


def test_a_gradient_that_is_not_finite(base, rows_file, tmp_path, monkeypatch, capsys):
    """The loss is finite; every row by itself is as well."""
    original, called = loop.clip, []

    def clip(fabric, model, optimizer, max_norm):
        called.append(1)
        if len(called) == 7:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = torch.inf
        return original(fabric, model, optimizer, max_norm)

    monkeypatch.setattr(loop, "clip", clip)
    out = tmp_path / "out"
    assert go("lora", base, rows_file, out, "--train.max_norm", 1) == 2
    error = one_line(capsys.readouterr().err)
    assert "Gradient norm is infinite at step 7." in error and "Each of its 8 rows has a finite loss" in error
    assert [p.name for p in checkpoints(out)] == ["step-000005"] and damage(out / "step-000005") is None
    assert len(json.loads((out / "crash" / "step-000007.json").read_text())["rows"]) == 8


def test_after_a_crash_the_run_goes_on(base, whole, rows_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(loop, "all_finite", lambda loss, norm: not (tmp_path / "out" / "step-000005").exists())
        assert go("lora", base, rows_file, tmp_path / "out") == 2
    assert go("lora", base, rows_file, tmp_path / "out", "--resume", "true") == 0
    same(tmp_path / "out", whole("lora"))


@pytest.mark.long
def test_not_finite_on_two_devices(base, rows_file, tmp_path):
    broken = edited(base, tmp_path / "base", layers__1__mlp__up_proj=lambda w: w[3, 5].fill_(torch.nan))
    process = start("lora", broken, rows_file, tmp_path / "out", "--devices", 2)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and said.count("litgpt: error") == 1 and "Traceback" not in said, said


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave))
    return ballast


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("leave", some([2**16, 2**19, 2**20], 2**16))
def test_a_full_disk(method, leave, base, whole, rows_file, small_disk, monkeypatch, capsys):
    """No room for the second checkpoint, at several of its files: the first is whole and the run goes on from it."""
    out = small_disk / "out"
    clip, ballast = loop.clip, []

    def filling(*args):
        if (out / "step-000005").exists() and not ballast:
            ballast.append(fill(small_disk, leave if method == "full" else leave // 8))
        return clip(*args)

    flags = ["--train.keep_last", 1]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "clip", filling)
        assert go(method, base, rows_file, out, *flags) == 2
    error = one_line(capsys.readouterr().err)
    assert f"The disk of {out} is full." in error and f" {out / 'step-000005'}." in error
    assert damage(out / "step-000005") is None
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"step-000005"}, "the half written folder is left"
    ballast[0].unlink()
    assert go(method, base, rows_file, out, *flags, "--resume", "true") == 0
    same(out, whole(method))


def test_no_room_for_a_line_of_metrics(base, whole, rows_file, small_disk, monkeypatch, capsys):
    out = small_disk / "out"
    clip, ballast = loop.clip, []

    def filling(*args):
        if (out / "step-000005").exists() and not ballast:
            with open(out / "metrics.csv", "a") as f:  # up to the end of its last block
                f.write("x" * (-f.tell() % os.statvfs(small_disk).f_frsize - 20))
            ballast.append(fill(small_disk, 0))
        return clip(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "clip", filling)
        assert go("lora", base, rows_file, out) == 2
    waits, error = capsys.readouterr().err.splitlines()
    assert str(out / "metrics.csv") in waits
    assert f"The disk of {out} is full." in error and f" {out / 'step-000005'}." in error
    ballast[0].unlink()
    assert go("lora", base, rows_file, out, "--resume", "true") == 0
    same(out, whole("lora"))


def test_a_full_disk_without_one(base, rows_file, tmp_path, monkeypatch, capsys):
    """Where no disk can be mounted."""
    write = TrainingState.write

    def failing(self, folder):
        if self.progress["steps"] == 10:
            raise OSError(28, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(TrainingState, "write", failing)
    assert go("lora", base, rows_file, tmp_path / "out") == 2
    assert "is full" in one_line(capsys.readouterr().err)
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["step-000005"]


# a full memory


def test_out_of_memory_names_shape_and_settings(base, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "explain_memory", lambda self: None)  # its plan takes seconds
    forward, calls = loop.clip, []

    def full(*args):
        calls.append(1)
        if len(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return forward(*args)

    monkeypatch.setattr(loop, "clip", full)
    out = tmp_path / "out"
    assert go("lora", base, rows_file, out) == 2
    error = one_line(capsys.readouterr().err)
    assert "Out of memory in a micro-batch of " in error and "tokens in 4 rows, the longest" in error
    assert "--train.micro_batch_size 2; --train.activation_checkpointing true; --quantize bnb.nf4." in error
    assert damage(out / "step-000005") is None


@pytest.mark.parametrize(
    ("train", "can_quantize", "all_trained", "longest", "expected"),
    [
        (TrainArgs(micro_batch_size=8), True, False, 100,
         ["--train.micro_batch_size 4", "--train.activation_checkpointing true", "--quantize bnb.nf4"]),
        (TrainArgs(activation_checkpointing=True), False, False, 1000,
         ["--train.activation_checkpointing offload", "--train.max_seq_length 500",
          "--optimizer SGD, which stores no moments"]),
        (TrainArgs(), False, True, 1000,
         ["--train.activation_checkpointing true", "--train.max_seq_length 500",
          "finetune lora, which trains fewer weights"]),
    ],
)  # fmt: skip
def test_what_helps(train, can_quantize, all_trained, longest, expected):
    batch = Batch(torch.zeros(1, longest), torch.zeros(1, longest), [longest], longest)
    error = str(out_of_memory(batch, train, can_quantize, all_trained))
    assert f"Try: {'; '.join(expected)}." in error and "litgpt plan" in error and f"the longest {longest:,}" in error


def test_errors_of_other_kinds_are_left_alone(tmp_path):
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and is_out_of_memory(MemoryError())
    for error in (RuntimeError("shapes do not fit"), UserError("no space left in this joke"), KeyError("x")):
        with pytest.raises(type(error)) as caught, in_words(SimpleNamespace(out_dir=tmp_path)):
            raise error
        assert caught.value is error


LIMITED = """
import resource, sys, threading
from litgpt.train import micro_batch
memory_dry_run = micro_batch.memory_dry_run
def limited(*args):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**25,) * 2)
    memory_dry_run(*args)
micro_batch.memory_dry_run, micro_batch.is_sure_to_fit = limited, lambda *args: False
from litgpt.__main__ main
""".replace("__main__ main", "__main__ import main\nmain(sys.argv[1:])")


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_a_memory_that_is_really_full(rows_file, tokenizer_file, tmp_path):
    """Found in the memory dry run, before the first step."""
    wide = save_llama(tmp_path / "wide", tokenizer_file, hidden_size=512, intermediate_size=4096, num_hidden_layers=3)
    command = words("full", wide, rows_file, tmp_path / "out", "--train.micro_batch_size", 8)
    run = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, timeout=300)
    assert run.returncode == 2, run.stderr
    error = one_line(run.stderr[run.stderr.index("litgpt: error") :])
    assert "Out of memory in a micro-batch of " in error and "tokens in 8 rows, the longest" in error
    assert "--train.micro_batch_size 4; --train.activation_checkpointing true; " in error
