"""The benchmarks run and count rightly. Nothing here looks at how fast anything is."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.checkpoint.hub import PICO
from litgpt.data.batches import UNTRAINED, Batch
from litgpt.methods.lora import lora_layers
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model.config import Config
from litgpt.train.loss import LossModel

FOLDER = Path(__file__).parent.parent / "benchmarks"
SHAPE = "--width 32 --layers 2 --heads 2 --mlp 48 --vocab 640".split()


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name, as if it were run; the names are too common to stay."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


def started(command: list[Any]) -> str:
    """What a command prints that succeeds."""
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_gpu_smoke(script, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    file = tmp_path / "gpu.jsonl"
    script("gpu").main(["--case", "smoke", "--micro_steps", "2", "--first", "1", "--json", str(file)])
    found = records(file)
    assert [r["method"] for r in found] == ["full", "lora", "qlora"]
    for r in found:
        assert r["tokens"] == 2 * 2 * 64  # of the micro-steps that were timed
        assert r["micro_step_s"] > 0 and r["optimizer_step_s"] >= 0
        assert r["mfu"] is None or 0 < r["mfu"] <= 1  # none where the machine was busier while the products were timed
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / (2 * r["micro_step_s"]), rel=0.05)
    assert "| smoke | qlora |" in capsys.readouterr().out


def test_gpu_needs_one(script, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "pick_device", lambda accelerator: torch.device("cpu"))
    with pytest.raises(SystemExit, match="not measured"):
        gpu.main([])


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_gpu_model_is_that_of_a_finetune(script, method):
    gpu = script("gpu")
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    model = gpu.build(Config(**gpu.SMOKE), method, "bf16-true", torch.device("cpu"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if method == "full":
        assert trained == {name for name, _ in model.named_parameters()}
    else:
        assert len(lora_layers(model)) == 2 and all("lora_" in name for name in trained)
        assert {model.get_parameter(name).dtype for name in trained} == {torch.float32}
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == (8 if method == "qlora" else 0) and all(m.weight is None for m in quantized)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(model.transformer.h[1].norm_1.weight, torch.ones(64, dtype=torch.bfloat16))
    assert 0.015 < float(model.transformer.wte.weight.detach().float().std()) < 0.025


def test_gpu_batches(script):
    gpu = script("gpu")
    (batch,) = gpu.make_batches(gpu.CASES["smoke"], 1, 640, None, PICO)
    assert batch.seqlens == [64, 64] and batch.n_target_tokens == int((batch.targets != UNTRAINED).sum()) == 126
    assert torch.equal(batch.targets[0, :63], batch.ids[0, 1:64]) and batch.targets[0, 63] == UNTRAINED
    batches = gpu.make_batches(gpu.CASES["alpaca"], 2, 640, None, PICO)
    assert [len(b.seqlens) for b in batches] == [8, 8]
    assert all(max(b.seqlens) <= 512 and b.ids.numel() == sum(b.seqlens) for b in batches)
    assert not torch.equal(batches[0].ids[:, :200], batches[1].ids[:, :200])


def test_gpu_packs(script):
    """Packs are full of short rows, and no row is trained on the next one's first token."""
    gpu = script("gpu")
    (batch,) = gpu.make_batches(gpu.CASES["packs"], 1, 640, None, PICO)
    ends = [sum(batch.seqlens[: i + 1]) for i in range(len(batch.seqlens))]
    assert batch.ids.shape == (1, 8192) and {4096, 8192} <= set(ends) and 16 < len(ends) < 100
    assert max(batch.seqlens) < 512 and min(batch.seqlens) > 0
    untrained = (batch.targets[0] == UNTRAINED).nonzero().squeeze(1).tolist()
    assert untrained == [end - 1 for end in ends] and batch.n_target_tokens == 8192 - len(ends)


def test_gpu_optimizers(script):
    pytest.importorskip("bitsandbytes")
    gpu = script("gpu")
    model = gpu.build(Config(**gpu.SMOKE), "full", "bf16-true", torch.device("cpu"))
    names = [type(gpu.make_optimizer(model, name)).__name__ for name in gpu.OPTIMIZERS]
    assert names == ["AdamW", "AdamW8bit"]


def test_gpu_decode(script, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    file = tmp_path / "decode.jsonl"
    flags = "--model smoke --batch 1 3 --prompt_tokens 9 --new_tokens 5".split()
    script("gpu_decode").main([*flags, "--json", str(file)])
    found = records(file)
    assert [(r["method"], r["batch"]) for r in found] == [(m, n) for m in ("bf16", "nf4") for n in (1, 3)]
    assert [r["tokens"] for r in found] == [4, 12, 4, 12] and all(r["tokens_per_s"] > 0 for r in found)
    assert found[0]["weight_bytes"] > 1.5 * found[2]["weight_bytes"]
    assert "| nf4 | 3 |" in capsys.readouterr().out


def test_train(tmp_path):
    file = tmp_path / "train.jsonl"
    flags = [*SHAPE, "--steps", "2", "--samples", "4", "--micro_batch_size", "2", "--precision", "32-true"]
    printed = started([sys.executable, FOLDER / "train.py", *flags, "--json", file, "--", "--lora_mlp", "true"])
    (record,) = records(file)
    assert record["steps"] == 2 and record["more"] == ["--lora_mlp", "true"]
    assert 8 * 40 < record["tokens"] <= 8 * 512 and (record["mfu"] is None or 0 < record["mfu"] <= 1)
    assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["seconds"], rel=0.01)
    assert os.name == "nt" or 1e8 < record["peak_memory"] < 1e10
    assert json.loads(printed.splitlines()[-1]) == record


def test_learning_rates(script, tmp_path, capsys):
    """Runs that are finished are not repeated, and those with other options are others."""
    rates = script("learning_rates")
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i)))} for i in range(12)]
    data = script("common").write_json(tmp_path / "rows.json", [*rows, rows[0]])
    words = [str(word) for word in ("--data", data, "--out", tmp_path / "out", "--models", PICO, "--methods", "lora")]
    words += "--rows 8 --val_rows 4 --epochs 1 --max_seq_length 64 --rate 0.003 --seeds 1 --exponents 0 9".split()
    rates.main(words)
    held, trained = (
        json.loads((tmp_path / "out" / "rows" / "rows-8-4" / name).read_text()) for name in ("val.json", "train.json")
    )
    assert len(held) == 4 and sorted([*held, *trained], key=rows.index) == rows
    lines = (tmp_path / "out" / "runs.csv").read_text().splitlines()
    assert len(lines) == 3 and ",0.003,1,1," in lines[1] and ",59.0,1,1," in lines[2]
    rates.main([*words[:-2], "-1", "0", "--", "--lora_r", "4"])
    rates.main(words)
    assert len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == 5
    assert capsys.readouterr().out.splitlines()[-1].startswith("| pico | 128 | lora | 0.003 | ")
    settings = {"model": "m", "hidden": 64, "method": "full", "lr": 0.00391}
    line = rates.line_of_table(settings, 4.0, [2.2, 2.0, 2.1], 2.1)
    assert line == "| m | 64 | full | 0.0039 | 4.000 | 2.200 | **2.000** | 2.100 | 5.0 % |"


def test_train_figures(script, tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(
        "step,epoch,loss,lr,val_loss,tokens,seconds,tokens_per_s,mfu,peak_memory\n"
        "0,,,,3.0,0,0.0,,,\n"
        "1,0.5,2.0,0.1,,100,4.0,25,0.1,500\n"
        "2,1.0,1.0,0.1,,300,5.0,200,0.6,700\n"
    )
    assert script("train").figures(file) == {
        "tokens": 300,
        "seconds": 5.0,
        "tokens_per_s": 60.0,
        "tokens_per_s_after_first": 200.0,
        "mfu": 0.2,
        "device_peak_memory": 700,
    }
    for known, mfu in ((",0.6,", 0.1), (",0.1,", 0.6), ("both", None)):  # steps without an MFU do not count
        text = file.read_text()
        for blank in (",0.6,", ",0.1,") if known == "both" else (known,):
            text = text.replace(blank, ",,")
        (tmp_path / "blank.csv").write_text(text)
        assert script("train").figures(tmp_path / "blank.csv")["mfu"] == mfu


def test_rows(script, tmp_path):
    common = script("common")
    rows = common.make_rows(500)
    assert rows == common.make_rows(500) != common.make_rows(500, seed=1)
    lengths = sorted(len(row["output"].split()) for row in rows)
    assert lengths[-1] > 4 * lengths[250] and lengths[50] < lengths[250] / 2, "a few are long, many are short"
    assert 100 < sum(bool(row["input"]) for row in rows) < 300
    file = common.write_json(tmp_path / "rows.json", rows[:3])
    chosen = common.choose_rows(file, 7)
    assert len(chosen) == 7 and all(row in chosen for row in rows[:3])


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell the peak of a process")
def test_peak_memory_is_of_the_process_alone(tmp_path):
    """Also after a larger one. In a process of its own, since this one is large."""
    code = (
        "import sys; from pathlib import Path; from common import run\n"
        "large, small = (run([sys.executable, '-c', f'b = bytearray({n}); b[::4096] = b[::4096]'], Path('log'))"
        " for n in (200_000_000, 1))\n"
        "assert large.peak_memory > 200_000_000 > 4 * small.peak_memory, (large, small)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(FOLDER)}, check=True
    )


def test_a_command_that_fails_ends_the_benchmark(script, tmp_path):
    with pytest.raises(SystemExit, match="no such thing"):
        script("common").run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log")


def test_what_the_peers_print(script):
    peer = script("peer")
    printed = "| - Input Tokens  :  900\n| - Tokens w/ Prompt :  4,425\n| - Training Time :  0.55 s\n"
    assert peer.litgpt_figures(printed) == {"tokens": 4425, "seconds": 0.55}
    assert peer.trl_figures('{"loss": 1}\n{"tokens": 12, "seconds": 3.5}\n') == {"tokens": 12, "seconds": 3.5}
    with pytest.raises(SystemExit, match="did not print"):
        peer.litgpt_figures("nothing")


def test_medians(script):
    def record(program: str, speed: float, memory: int | None, precision: str = "32-true") -> dict:
        return {
            "program": program,
            "version": "1",
            "method": "lora",
            "precision": precision,
            "tokens_per_s": speed,
            "peak_memory": memory,
        }

    ours = [record("this project", speed, 10**9) for speed in (100, 3000, 200)]
    theirs = [record("LitGPT", speed, 2 * 10**9) for speed in (50, 80, 1)]
    lines = script("medians").table([*ours, *theirs, record("TRL", 7, None, "bf16-true")]).splitlines()
    assert lines[2:] == [
        "| lora | 32-true | this project 1 | 3 | 200 |  | 1.00 GB |  |",
        "| lora | 32-true | LitGPT 1 | 3 | 50 | 4.00 | 2.00 GB | 0.50 |",
        "| lora | bf16-true | TRL 1 | 1 | 7 | - | not measured | - |",
    ]


def test_generate(script, tmp_path, capsys):
    file = tmp_path / "generate.jsonl"
    flags = "--precision 32-true --prompts 3 --new_tokens 4 --prompt_tokens 5 --rounds 1".split()
    script("generate").main([*SHAPE, *flags, "--json", str(file)])
    (record,) = records(file)
    assert record["prompts"] == 3 and record["new_tokens"] == 4
    assert all(record[name] > 0 for name in ("f_linear", "products", "one", "many"))
    assert "\n3  prompts " in capsys.readouterr().out


def test_a_command_is_timed_until_it_is_ready(script, tmp_path):
    file, log = tmp_path / "ready", tmp_path / "log"
    until = script("startup").until
    assert until([sys.executable, "-c", f"open({str(file)!r}, 'w')"], log, file.exists) > 0
    for ready in (False, True):  # it fails before, and after it was ready
        with pytest.raises(SystemExit, match="no such thing"):
            until([sys.executable, "-c", "raise SystemExit('no such thing')"], log, lambda ready=ready: ready)


@pytest.mark.long
def test_startup(script, tmp_path, capsys):
    file = tmp_path / "startup.jsonl"
    script("startup").main(["--runs", "1", "--json", str(file)])
    (record,) = records(file)
    assert record["model"] == "pico" and record["runs"] == 1 and record["help_s"] > 0 and record["first_step_s"] > 0


@pytest.mark.long
def test_serve(tmp_path):
    pytest.importorskip("fastapi")
    file = tmp_path / "serve.jsonl"
    flags = ["--clients", 3, "--tokens", 5, "--words", 6, "--json", file]
    printed = started([sys.executable, FOLDER / "serve.py", PICO, *flags])
    (record,) = records(file)
    assert json.loads(printed) == record
    assert record["model"] == "pico" and record["clients"] == record["same answers"] == 3
    assert 0 < record["tokens"] <= 15 and record["ratio"] > 0


@pytest.mark.long
def test_evaluate(tmp_path):
    pytest.importorskip("lm_eval")
    file = tmp_path / "evaluate.jsonl"
    started([sys.executable, FOLDER / "evaluate.py", "--model", PICO, "--questions", 3, "--batch", 2, "--json", file])
    found = records(file)
    assert [r["kind"] for r in found] == [k for k in ("four answers", "five examples", "pairs") for _ in range(3)]
    assert {r["program"] for r in found} == {"lm-eval's hf, batch 2", "ours, batch 2", "ours, auto"}
    assert [r["requests"] for r in found[::3]] == [12, 12, 6]
    assert all(r["largest_difference"] < 1e-3 for r in found)


@pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="needs a shell")
@pytest.mark.parametrize("word", ["ROUND=1", "--rounds", "rounds=1"])
def test_compare_refuses_what_it_does_not_know(word, tmp_path):
    run = subprocess.run(["bash", FOLDER / "compare.sh", f"WORK={tmp_path}", word], capture_output=True, text=True)
    assert run.returncode == 2 and "see compare.sh -h" in run.stderr and not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="needs a shell")
def test_compare(tmp_path):
    """Ours alone, with two vocabularies: the second has LoRA alone, and a file of its own."""
    words = "PROGRAMS=ours ROUNDS=1 STEPS=2 SAMPLES=4 MICRO=2 PRECISIONS=32-true".split()
    words += [f"PYTHON={sys.executable}", f"WORK={tmp_path / 'work'}", f"OUT={tmp_path / 'new' / 'out.jsonl'}"]
    words += ["METHODS=full lora", "VOCAB=640 704", f"SHAPE={' '.join(SHAPE[:-2])}"]
    printed = started(["bash", FOLDER / "compare.sh", *words])
    first, second = (records(tmp_path / "new" / name) for name in ("out.jsonl", "out-704.jsonl"))
    assert [r["method"] for r in first] == ["full", "lora"] and [r["method"] for r in second] == ["lora"]
    assert all(r["steps"] == 2 and r["samples"] == 4 and r["max_seq_length"] == 512 for r in first + second)
    for method, times in (("full", 1), ("lora", 2)):
        assert printed.count(f"| {method} | 32-true | this project ") == times


def test_what_is_kept_for_the_backward_pass_follows_the_tokens(script):
    """Rows of 20 tokens and one of 1,300 keep what as many tokens in equal rows keep."""
    shapes, gpu = script("memory").SHAPES, script("gpu")
    assert {sum(seqlens) for seqlens in shapes.values()} == {2580}
    model = LossModel(gpu.build(Config(**gpu.SMOKE | {"block_size": 2048}), "lora", "32-true", torch.device("cpu")))

    def kept(seqlens: list[int]) -> int:
        ids, saved = torch.randint(640, (1, 2580)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            model(Batch(ids, ids, seqlens, 2580))
        return sum(saved)

    assert kept(shapes["mixed"]) < 1.15 * kept(shapes["equal"])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_memory_follows_the_tokens(script, tmp_path, precision):
    file = tmp_path / "memory.jsonl"
    sizes = "--width 256 --layers 3 --heads 4 --mlp 688 --vocab 4000".split()
    script("memory").main(["rows", *sizes, "--precision", precision, "--json", str(file)])
    (record,) = records(file)
    assert record["equal"]["memory"] > 1e7
    assert record["mixed"]["memory"] < 1.15 * record["equal"]["memory"], record


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_follow_the_steps(script, tmp_path):
    file = tmp_path / "memory.jsonl"
    script("memory").main(["steps", "--steps", "100", "--precision", "32-true", "--json", str(file)])
    (record,) = records(file)
    assert record["steps"] == 100 and record["early"] > 1e8 and record["late"] < 1.15 * record["early"], record


def test_rows_to_tokens(tmp_path):
    file = tmp_path / "rows.jsonl"
    started([sys.executable, FOLDER / "rows.py", "--rows", 60, "--rounds", 1, "--json", file])
    (found,) = records(file)
    assert found["rows"] == 60 and 10 < found["tokens_per_row"] < 60
    assert found["ratio"] == pytest.approx(found["all_cores_rows_per_s"] / found["one_process_rows_per_s"], rel=0.2)
