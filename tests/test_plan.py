"""The memory of a run, predicted without running it, against what torch's allocator reports."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.train.args import PlanArgs, planning
from litgpt.train.memory import plan as module
from litgpt.train.memory import predict as predictor
from litgpt.train.memory.plan import GPUS, target_of
from litgpt.train.memory.predict import Rehearsal, as_rehearsed, largest_batches, layers_to_run, predict
from litgpt.train.peaks import find_peak
from tests.test_training import files  # noqa: F401

SETTINGS = {  # of runs of the built-in model on a CPU
    "lora": ["lora", "--train.micro_batch_size", 2],
    "full": ["full", "--train.micro_batch_size", 2],
    "full bf16": ["full", "--precision", "bf16-true", "--train.micro_batch_size", 4],
    "full mixed": ["full", "--precision", "bf16-mixed"],
    "full SGD": ["full", "--optimizer", "SGD"],
    "packs": ["full", "--train.pack", "true", "--train.max_seq_length", 256, "--train.micro_batch_size", 4],
    "lora everywhere bf16": ["lora", "--precision", "bf16-true", "--lora_mlp", "true", "--lora_projection", "true"],
    "dora": ["lora", "--lora_variant", "dora", "--train.micro_batch_size", 4],
    "nf4": ["lora", "--quantize", "bnb.nf4", "--train.micro_batch_size", 2],
    "checkpointing": ["lora", "--train.activation_checkpointing", "true", "--train.micro_batch_size", 8],
    "adapter": ["adapter", "--train.micro_batch_size", 2],
    "adapter_v2": ["adapter_v2"],
    "one micro-batch": ["lora", "--train.micro_batch_size", 8],
}
QUICK = ("lora", "full bf16", "nf4")


def run_of(words: list[Any], tmp_path: Path, files: Path) -> Any:  # noqa: F811
    """The `Run` of a command line, with its rows loaded."""
    found: list[Any] = []

    def keep(run: Any, args: PlanArgs) -> None:
        run.out_dir = tmp_path / "never"
        module.load(run)
        found.append(run)

    flags = ["--data", "JSON", "--data.json_path", files, "--train.global_batch_size", 8, "--accelerator", "cpu"]
    token = planning.set(PlanArgs())
    try:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(module, "plan", keep)
            main(["finetune", *map(str, [words[0], "pico", *flags, *words[1:]])])
    finally:
        planning.reset(token)
    return found[0]


class NoMeter:
    """In place of a `Meter`, for steps that are really run."""

    place = ""

    def name(self, *args: Any) -> None: ...

    def name_all(self, *args: Any) -> None: ...


def allocated(run: Any) -> int:
    """The peak of the same two steps, as the profiler of torch's allocator saw it."""
    run = as_rehearsed(run)
    batches = largest_batches(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run.build()
        trainer = Rehearsal(run, batches, NoMeter())  # type: ignore[arg-type]
        with torch.profiler.record_function("the steps"):
            trainer.fit()
    total = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore
        if event.name() == "the steps":
            peak = total
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in SETTINGS])
def test_peak_is_that_of_the_allocator(name, files, tmp_path, monkeypatch):  # noqa: F811
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    run = run_of(SETTINGS[name], tmp_path, files)
    predicted, real = predict(run, gpu=False), allocated(run)
    print(f"{name}: {predicted.peak:,} predicted, {real:,} allocated, at {predicted.place}")
    assert predicted.peak == pytest.approx(real, rel=0.01)
    assert predicted.kinds["trained"] + predicted.kinds["optimizer"] == pytest.approx(predicted.state, rel=0.01)


@pytest.mark.parametrize("words", [["lora"], ["full", "--train.activation_checkpointing", "true"]])
def test_fewer_layers_tell_the_same(words, files, tmp_path, monkeypatch):  # noqa: F811
    run = run_of(words, tmp_path, files)
    run.base_model = predictor.shortened(run.base_model, 4)
    config = replace(run.base_model.config, n_layer=14)
    run.base_model = replace(run.base_model, config=config)
    assert layers_to_run(config) == (3, 6)
    some = predict(run, gpu=True)
    monkeypatch.setattr(predictor, "layers_to_run", lambda config: (14, 14))
    every = predict(run, gpu=True)
    assert some.peak == pytest.approx(every.peak, rel=0.005) and some.place == every.place
    assert some.flops == pytest.approx(every.flops) and some.state == pytest.approx(every.state, rel=0.005)


def test_layers_with_patterns():
    gemma3 = Config.from_name("Gemma-3-1b-it")
    few, many = layers_to_run(gemma3)
    assert few % 6 == 0 and many == 2 * few
    assert layers_to_run(Config.from_name("Llama-3.1-8B")) == (3, 6)
    assert layers_to_run(Config.from_name("pythia-14m")) == (6, 6)


@pytest.mark.parametrize(("text", "gib"), [("24 GB", 24), ("24GB", 24), ("80", 80), ("11.5 GiB", 11.5)])
def test_memory_of_a_gpu(text, gib):
    target = target_of(text, torch.device("cpu"))
    assert target.memory == gib * 2**30 and target.is_gpu and target.peak is None


@pytest.mark.parametrize("label", GPUS)
def test_known_gpus(label):
    """By their label in any spelling, and by the name that torch has for them."""
    memory, name = GPUS[label]
    for text in (label, label.lower().replace(" ", "-"), name):
        target = target_of(text, torch.device("cpu"))
        assert target.memory == memory * 2**30 and target.peak is find_peak(name) is not None


def test_unknown_gpus():
    with pytest.raises(UserError, match="--gpu"):
        target_of("Voodoo 2", torch.device("cpu"))
    assert not target_of(None, torch.device("cpu")).is_gpu


@pytest.fixture
def no_weights(tmp_path) -> Path:
    """A folder with the shape of Llama-3.1-8B and a tokenizer, but without weights."""
    from litgpt.checkpoint.hub import PICO
    from litgpt.families import write_config

    folder = tmp_path / "8B"
    folder.mkdir()
    for file in PICO.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(write_config(Config.from_name("Llama-3.1-8B"))), encoding="utf-8")
    return folder


def plan(capsys: pytest.CaptureFixture, *words: object) -> str:
    main(["plan", *map(str, words)])
    return capsys.readouterr().out


def test_without_weights(no_weights, files, capsys):  # noqa: F811
    """An 8B model on a card of 12 GB: only the quantized base fits."""
    out = plan(capsys, "finetune", "lora", no_weights, "--data", files, "--gpu", "12 GB", "--train.micro_batch_size", 2)
    lines = out.splitlines()
    rungs = {name: line.split() for name, line in pairwise(lines) if line.startswith("  ")}
    assert rungs["this run"][-1] == "no" and rungs["--quantize bnb.nf4"][-1] == "yes"
    assert float(rungs["this run"][0]) == pytest.approx(8.03e9 * 2 / 2**30, rel=0.01)
    assert float(rungs["--quantize bnb.nf4"][0]) == pytest.approx(5.6, abs=0.1)
    assert lines[-1].startswith("Run:") and lines[-1].endswith("--quantize bnb.nf4")
    assert all(len(line) <= 80 for line in lines[:-1]), out


def test_settings_that_are_applied(no_weights, files, tmp_path, capsys):  # noqa: F811
    """The file is a config, and its plan has the same numbers."""
    words = ["finetune", "lora", no_weights, "--data", files, "--gpu", "12 GB"]
    out = plan(capsys, *words, "--apply", tmp_path / "fits.yaml")
    assert yaml.safe_load((tmp_path / "fits.yaml").read_text()) == {"quantize": "bnb.nf4"}
    again = plan(capsys, *words, "--config", tmp_path / "fits.yaml")
    before = out.splitlines()
    numbers = before[before.index("--quantize bnb.nf4") + 1]
    after = again.splitlines()
    assert after[after.index("this run") + 1] == numbers


def test_time_and_cost(files, capsys):  # noqa: F811
    out = plan(capsys, "finetune", "pico", "--data", files, "--gpu", "H100", "--utilization", 0.5, "--price", 2)
    assert "tokens/s" in out and "at 2 an hour" in out and "at 50% of the peak" in out.lower()


def test_without_data(no_weights, capsys):
    out = plan(capsys, "finetune", "lora", no_weights, "--tokens", 4096, "--gpu", "H100", "--train.micro_batch_size", 2)
    lines = out.splitlines()
    assert "1,000 assumed rows, 4,096,000 tokens, longest 4,096; largest micro-batch 8,192" in out
    kept = float(lines[lines.index("this run") + 1].split()[4])
    assert kept == pytest.approx(92.16 * 32 * 8192 / 2**20, rel=0.06), "what the pages say, and what the head keeps"


def test_dry_run(files, tmp_path, capsys):  # noqa: F811
    main(["finetune", "pico", "--data", str(files), "--out_dir", str(tmp_path / "out"), "--dry_run"])
    assert "this run" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["chat"], ["finetune", "lora"], ["finetune", "pico", "--gpu", "none"]])
def test_errors(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("words", [["--utilization", "0"], ["--price", "-1"], ["--apply", "{there}"]])
def test_values_that_mean_nothing(words, files, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        plan(capsys, "finetune", "pico", "--data", files, *(word.format(there=files) for word in words))
    assert words[0] in capsys.readouterr().err


def test_nothing_is_applied_if_nothing_fits(files, tmp_path, capsys):  # noqa: F811
    plan(capsys, "finetune", "pico", "--data", files, "--gpu", "0.6 GB", "--apply", tmp_path / "fits.yaml")
    assert not (tmp_path / "fits.yaml").exists()


def test_random_weights(capsys):
    """A model that does not exist yet takes what one of its shape takes."""
    model = "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,"
    model += " max_position_embeddings: 128}"
    words = ["pretrain", "--model_config", model, "--tokenizer_dir", "pico", "--data", "PicoText", "--gpu", "T4"]
    out = plan(capsys, *words)
    assert "16-mixed" in out, "what a T4 has by default"


@pytest.mark.parametrize("optimizer", ["NAdam", "AdEMAMix"])
def test_optimizers_that_read_values(optimizer, files, tmp_path):  # noqa: F811
    if optimizer == "AdEMAMix":
        pytest.importorskip("bitsandbytes")
    run = run_of(["full", "--optimizer", optimizer], tmp_path, files)
    moments = 3 if optimizer == "AdEMAMix" else 2
    assert predict(run, gpu=True).kinds["optimizer"] == pytest.approx(moments * 4 * run.n_parameters, rel=0.02)


def test_chunks_of_a_gpu(files, tmp_path):  # noqa: F811
    """Stochastic rounding works on 2^24 weights at once there: four float32 copies, and a random number for three."""
    found = predict(run_of(["full", "--precision", "bf16-true"], tmp_path, files), gpu=True)
    n = found.kinds["trained"] / 2
    assert found.place == "the optimizer" and found.kinds["temporary"] == pytest.approx((4 + 3) * 4 * n, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora", "full", "nf4"])
def test_peak_on_a_gpu(name, files, tmp_path):  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    words = [w for w in SETTINGS[name] if w != "cpu"]
    run = run_of([*words, "--accelerator", "cuda"], tmp_path, files)
    predicted = predict(run, gpu=True)
    run = as_rehearsed(run)
    run.device = run.fabric.device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.build()
    Rehearsal(run, [b.to(run.device) for b in largest_batches(run)], NoMeter()).fit()  # type: ignore[arg-type]
    assert predicted.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)
