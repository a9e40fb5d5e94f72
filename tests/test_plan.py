"""The memory of a run, predicted without running it, against what torch's allocator reports."""

import json
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensor

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.errors import UserError
from litgpt.families import write_config
from litgpt.model.config import Config
from litgpt.train import loop
from litgpt.train.args import PlanArgs, planning
from litgpt.train.devices import launch
from litgpt.train.memory import plan as module
from litgpt.train.memory import predict as predictor
from litgpt.train.memory.bound import upper_bound
from litgpt.train.memory.meter import Meter
from litgpt.train.memory.plan import GPUS, Target, target_of
from litgpt.train.memory.predict import as_rehearsed, layers_to_run, measure, predict
from litgpt.train.memory.sharded import on_ranks
from litgpt.train.peaks import find_peak
from litgpt.train.run import Run
from tests.conftest import save_llama, some
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
QUICK = ("full bf16",)


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


def allocated(run: Any, devices: int = 1) -> int:
    """What the steps allocate on a CPU; with several devices, on the first rank of a process group that moves
    nothing."""
    if devices == 1:
        return measure(run, torch.device("cpu"))
    rehearsed = as_rehearsed(run)
    with pytest.MonkeyPatch.context() as m, on_ranks(rehearsed, devices, Meter(1)):
        m.setattr(predictor, "as_rehearsed", lambda run: run)
        return measure(rehearsed, torch.device("cpu"))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in SETTINGS])
def test_peak_is_that_of_the_allocator(name, files, tmp_path, monkeypatch):  # noqa: F811
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    run = run_of(SETTINGS[name], tmp_path, files)
    predicted, real = predict(run, gpu=False), allocated(run)
    print(f"{name}: {predicted.peak:,} predicted, {real:,} allocated, at {predicted.place}")
    assert predicted.peak == pytest.approx(real, rel=0.01)
    assert predicted.kinds["trained"] + predicted.kinds["optimizer"] == pytest.approx(predicted.state, rel=0.01)
    assert upper_bound(run, run.train.micro_rows) > 1.2 * real


@pytest.mark.long
@pytest.mark.parametrize("name", ["lora", "full", "full bf16"])
def test_peak_with_a_vocabulary_of_128k(name, files, tmp_path, tokenizer_file, monkeypatch):  # noqa: F811
    """The head's chunks of logits have their own size there."""
    folder = save_llama(tmp_path / "wide", tokenizer_file, vocab_size=128256, hidden_size=64)
    command = main
    monkeypatch.setitem(globals(), "main", lambda words: command([str(folder) if w == "pico" else w for w in words]))
    run = run_of(SETTINGS[name], tmp_path, files)
    assert run.base_model.config.padded_vocab_size == 128256
    assert predict(run, gpu=False).peak == pytest.approx(allocated(run), rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", ["full", "full bf16", "lora", "checkpointing"])
def test_peak_of_a_sharded_run(name, devices, files, tmp_path):  # noqa: F811
    run = run_of(SETTINGS[name], tmp_path, files)
    predicted, real = predict(run, False, devices), allocated(run, devices)
    print(f"{name} on {devices}: {predicted.peak:,} predicted, {real:,} allocated, at {predicted.place}")
    assert predicted.peak == pytest.approx(real, rel=0.01)


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
    assert layers_to_run(Config.from_name("Qwen3.5-9B")) == (4, 8)
    assert layers_to_run(Config.from_name("pythia-14m")) == (6, 6)


@pytest.mark.parametrize(
    ("text", "gib"),
    [("24 GB", 24), ("24GB", 24), ("24gb", 24), ("80", 80), ("11.5 GiB", 11.5), ("24576 MB", 24), ("24576MiB", 24)],
)
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


def test_parts_of_names_of_gpus():
    assert target_of("nvidia h200", torch.device("cpu")).name == "H200"
    assert target_of("GeForce RTX 4090", torch.device("cpu")).name == target_of("rtx4090", torch.device("cpu")).name
    with pytest.raises(UserError, match="A100 40GB, A100 80GB"):
        target_of("a100", torch.device("cpu"))


@pytest.mark.long
def test_several_gpus(no_weights, capsys):
    """Full finetuning of an 8B model: one device of 48 GB cannot hold it with AdamW; two of them share it."""
    assert target_of("2 x 48 GB", torch.device("cpu")).devices == 2
    words = ["finetune", "full", no_weights, "--tokens", 512, "--train.micro_batch_size", 1, "--precision", "bf16-true"]
    out = plan(capsys, *words, "--gpu", "2 x 48 GB", "--optimizer", "SGD")
    lines = out.splitlines()
    row = lines[lines.index("this run") + 1].split()
    assert float(row[1]) == pytest.approx(8.03e9 * 2 / 2 / 2**30, rel=0.01) and row[-1] == "yes"


@pytest.mark.long
def test_several_devices_share_state_and_time(files, capsys):  # noqa: F811
    """A checkpoint has the shards of all devices, and two devices are twice as fast."""
    words = ["finetune", "full", "pico", "--data", files, "--utilization", 0.5, "--train.micro_batch_size", 2, "--gpu"]
    one, two = (plan(capsys, *words, gpu) for gpu in ("H100", "2 x H100"))
    states, speeds = [], []
    for out in (one, two):
        lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
        states.append(float(lines["A"].split()[3]))
        speeds.append(int(lines["Time"].split("peak: ")[1].split()[0].replace(",", "")))
    assert states[0] == pytest.approx(states[1], rel=0.01)
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.01)


def test_unknown_gpus():
    with pytest.raises(UserError, match="--gpu"):
        target_of("Voodoo 2", torch.device("cpu"))
    assert not target_of(None, torch.device("cpu")).is_gpu


@pytest.fixture
def no_weights(tmp_path) -> Path:
    """A folder with the shape of Llama-3.1-8B and a tokenizer, but without weights."""
    return no_weights_folder(tmp_path, write_config(Config.from_name("Llama-3.1-8B")))


def no_weights_folder(tmp_path: Path, fields: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in PICO.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def plan(capsys: pytest.CaptureFixture, *words: object) -> str:
    main(["plan", *map(str, words)])
    return capsys.readouterr().out


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_time_and_cost(files, capsys):  # noqa: F811
    out = plan(capsys, "finetune", "pico", "--data", files, "--gpu", "H100", "--utilization", 0.5, "--price", 2)
    assert "tokens/s" in out and "at 2 an hour" in out and "at 50% of the peak" in out.lower()


@pytest.mark.long
def test_without_data(no_weights, capsys):
    out = plan(capsys, "finetune", "lora", no_weights, "--tokens", 4096, "--gpu", "H100", "--train.micro_batch_size", 2)
    lines = out.splitlines()
    assert "1,000 assumed rows, 4,096,000 tokens, longest 4,096; largest micro-batch 8,192" in out
    kept = float(lines[lines.index("this run") + 1].split()[4])
    assert kept == pytest.approx(92.16 * 32 * 8192 / 2**20, rel=0.06), "what the pages say, and what the head keeps"


@pytest.mark.long
def test_measure(files, capsys):  # noqa: F811
    words = ["finetune", "pico", "--data", files, "--train.micro_batch_size", 4, "--accelerator", "cpu"]
    line = next(x for x in plan(capsys, *words, "--measure").splitlines() if x.startswith("Measured"))
    assert 0.99 < float(line.split()[-1]) < 1.01, line


@pytest.mark.parametrize(("command", "scheme"), [("generate", None), ("serve", None), ("chat", "bnb.nf4")])
def test_inference(command, scheme, no_weights, capsys):
    """Weights of 16 or about half a byte each; 2 * 8 heads * 128 dimensions * 2 bytes * 32 layers per token."""
    words = [command, no_weights, "--gpu", "24 GB", "--tokens", 8192]
    out = plan(capsys, *words, *(["--quantize", scheme] if scheme else []))
    numbers = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if "GiB" in line[15:30]}
    assert numbers["weights"] == pytest.approx(5.6 if scheme else 14.96, abs=0.1)
    assert numbers["cache"] == 2 * 8 * 128 * 2 * 32 * 8192 / 2**30 == 1.0
    n_fitting = int(out.splitlines()[-1].split()[0])
    room = (24 - 0.6) * 0.97 - numbers["weights"] - numbers["temporary"]
    assert n_fitting == int(room / numbers["cache"])


@pytest.mark.parametrize("gpu", [["--gpu", "L4"], []])
@pytest.mark.parametrize("folder", ["pico", "llama"])
def test_inference_of_a_folder_with_weights(folder, gpu, llama, capsys):
    out = plan(capsys, "serve", llama if folder == "llama" else folder, *gpu)
    assert "fit at the same time" in out and all(len(line) <= 80 for line in out.splitlines())


def test_cache_of_windows(tmp_path, files, capsys):  # noqa: F811
    """Local layers of Gemma 3 keep 512 tokens; every sixth keeps all."""
    folder = no_weights_folder(tmp_path, write_config(Config.from_name("Gemma-3-1b-it")))
    out = plan(capsys, "generate", folder, "--gpu", "24 GB", "--tokens", 32768)
    line = next(line for line in out.splitlines() if line.startswith("cache"))
    layers = 4 * 32768 + 22 * 512
    assert float(line.split()[1]) == pytest.approx(2 * 256 * 2 * layers / 2**30, abs=0.006)


@pytest.fixture
def small_machine(monkeypatch):
    """A function that sets the memory of this machine."""

    def limit(n_bytes: float) -> None:
        for place in (launch, module):
            monkeypatch.setattr(place, "usable_memory", lambda *_: n_bytes)

    return limit


@pytest.mark.long
def test_a_run_that_does_not_fit(small_machine, files, tmp_path, capsys, monkeypatch):  # noqa: F811
    """It says so before it reads a weight or writes a file, and the settings of the plan that it prints do fit."""
    words = ["finetune", "full", "pico", "--data", str(files), "--out_dir", str(tmp_path / "out")]
    words += ["--train.micro_batch_size", "8", "--train.max_steps", "1", "--accelerator", "cpu"]
    peaks = [predict(run_of(words[1:2] + words[7:9] + more, tmp_path, files), False).peak for more in ([], SMALLER)]
    assert 1.2 * peaks[1] < peaks[0]
    small_machine(1.1 * peaks[1])
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(Run, "make_saver", lambda *_: pytest.fail("the run was built"))  # a rehearsal has its own
        main(words)
    shown = capsys.readouterr()
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert len(shown.err.splitlines()) == 1 and "GiB" in shown.err and "this run" in shown.out
    command = shlex.split(shown.out.splitlines()[-1].removeprefix("Run:"))[1:]
    assert command[: len(words)] == words and command[len(words) :]
    main(command)
    assert (tmp_path / "out/final").is_dir()


SMALLER = ["--train.micro_batch_size", "1", "--train.activation_checkpointing", "true"]


def test_a_run_that_just_fits(small_machine, files, tmp_path, capsys):  # noqa: F811
    """The bound is above the memory, the prediction is not."""
    run = run_of(["lora"], tmp_path, files)
    small_machine(1.02 * predict(run, gpu=False).peak)
    words = ["finetune", "lora", "pico", "--data", files, "--out_dir", tmp_path / "out", "--accelerator", "cpu"]
    main([*map(str, words), "--train.max_steps", "1", "--train.micro_batch_size", "1"])
    assert "this run" not in capsys.readouterr().out


@pytest.mark.long
def test_out_of_memory_shows_what_fits(files, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Settings that are predicted to take as much as the run that failed are no advice."""

    clip = loop.clip

    def full(fabric: Any, model: Any, *args: Any) -> Any:
        if isinstance(next(model.parameters()), FakeTensor):  # in the plan
            return clip(fabric, model, *args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(loop, "clip", full)
    words = ["finetune", "lora", "pico", "--data", files, "--out_dir", tmp_path / "out", "--accelerator", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--train.micro_batch_size", "4"])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and "Out of memory" in shown.err
    lines = shown.out.splitlines()
    assert lines[lines.index("this run") + 1].split()[-1] == "no"
    assert "--train." in lines[-1] and lines[-1].startswith("Run:  litgpt finetune lora pico")


@pytest.mark.parametrize("command", ["lora", "full", "adapter", "adapter_v2", "pretrain"])
def test_dry_runs_download_no_weights(command, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def download(repo_id: str, tokenizer_only: bool = False, **_: Any) -> Path:
        assert tokenizer_only, "weights were downloaded"
        return no_weights_folder(tmp_path, json.loads((PICO / "config.json").read_text()))

    monkeypatch.setattr("litgpt.checkpoint.download.download", download)
    monkeypatch.setattr(module, "ladder", lambda run, target: [])
    monkeypatch.setattr(module, "print_plan", lambda run, *_: print(f"planned {run.base_model.config.n_layer} layers"))
    model = ["--initial_checkpoint_dir"] if command == "pretrain" else []
    words = ["pretrain"] if command == "pretrain" else ["finetune", command]
    data = ["--data", "PicoText"] if command == "pretrain" else ["--data", str(files)]
    main([*words, *model, "org/name", *data, "--dry_run", "true"])
    assert "planned 4 layers" in capsys.readouterr().out


def test_a_run_is_refused_before_its_weights_are_loaded(small_machine, files, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("litgpt.train.memory.fit.ladder", lambda run, target: [module.rung_of(run, {}, target)])
    monkeypatch.setattr(Run, "make_saver", lambda *_: pytest.fail("the run was built"))  # a rehearsal has its own
    small_machine(10**6)
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "full", "pico", "--data", str(files), "--out_dir", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and len(shown.err.splitlines()) == 1 and "this run" in shown.out
    assert not (tmp_path / "out").exists()


def test_memory_of_a_container(tmp_path, monkeypatch):
    machine = launch.device_memory(torch.device("cpu"), 1)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(launch, "CONTAINER_MEMORY", limit)
    for text, expected in (("max\n", machine), (f"{2**30}\n", 2**30), (f"{2**60}\n", machine)):
        limit.write_text(text)
        assert launch.device_memory(torch.device("cpu"), 1) == expected
    limit.write_text(f"{2**30}\n")
    assert launch.device_memory(torch.device("cpu"), 2) == 2**29


def test_memory_of_a_gpu_that_others_use(monkeypatch):
    """This process can have what is free and what it has reserved."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 2**30)
    assert launch.usable_memory(torch.device("cuda"), 1) == 15 * 2**30 + launch.CONTEXT


def test_a_plan_shards_if_the_run_would(files, tmp_path):  # noqa: F811
    """Two devices keep the whole model each, unless it takes more than most of their memory."""
    run = run_of(["lora", "--devices", "2"], tmp_path, files)
    big, small = (Target("", n, True) for n in (2**34, run.n_parameters))
    weights = [module.rung_of(run, {}, target).prediction.kinds["weights"] for target in (big, small)]
    assert weights[1] < 0.6 * weights[0]


@pytest.mark.parametrize("rows", some([2, 4], 4))
def test_micro_batch_that_auto_takes(rows, files, tmp_path):  # noqa: F811
    """On a GPU, the largest divisor of the 8 rows of a step that fits."""
    run = run_of(["full", "--train.micro_batch_size", "auto"], tmp_path, files)
    run.use_micro_batch([1])
    peaks = [predict(module.changed(run, {"train.micro_batch_size": n}), gpu=True).peak for n in (rows, 2 * rows)]
    target = Target("", sum(peaks) / 2 / module.USABLE + module.CONTEXT, is_gpu=True)
    rung = module.rung_of(run, {}, target)
    assert rung.fits and module.largest_micro_batch(run, rung, target) == rows


@pytest.mark.long
def test_a_plan_with_fsdp_suggests_nothing_that_it_refuses(files, tmp_path):  # noqa: F811
    """Such as a base in 4 bits, although nothing fits."""
    run = run_of(["lora", "--devices", "2", "--strategy", "fsdp"], tmp_path, files)
    tried = [rung.changes for rung in module.ladder(run, Target("", 1.0, is_gpu=False))]
    assert {} in tried and not any("quantize" in changes for changes in tried)


def test_dry_run(files, tmp_path, capsys):  # noqa: F811
    main(["finetune", "pico", "--data", str(files), "--out_dir", str(tmp_path / "out"), "--dry_run"])
    assert "this run" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["chat"],
        ["finetune", "lora"],
        ["finetune", "pico", "--gpu", "none"],
        ["finetune", "pico", "--measure", "--gpu", "H100"],
    ],
)
def test_errors(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("words", [["--utilization", "0"], ["--price", "-1"], ["--apply", "{there}"]])
def test_values_that_mean_nothing(words, files, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        plan(capsys, "finetune", "pico", "--data", files, *(word.format(there=files) for word in words))
    assert words[0] in capsys.readouterr().err


@pytest.mark.long
def test_nothing_is_applied_if_nothing_fits(files, tmp_path, capsys):  # noqa: F811
    plan(capsys, "finetune", "pico", "--data", files, "--gpu", "0.6 GB", "--apply", tmp_path / "fits.yaml")
    assert not (tmp_path / "fits.yaml").exists()


@pytest.mark.long
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
    assert predicted.peak == pytest.approx(measure(run, torch.device("cuda", 0)), rel=0.05)
