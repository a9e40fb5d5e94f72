"""The loop's loss curve is that of `peft` with padded batches and a token-weighted loss."""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from litgpt.__main__ import main
from litgpt.data.batches import UNTRAINED, Batch, steps_of_rows
from litgpt.data.json_file import JSON
from litgpt.data.tokens import IN_LOSS
from litgpt.model import kernels, kernels_cpu
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.loss import LossModel
from litgpt.train.schedule import learning_rate
from tests.conftest import make_rows, some
from tests.runs import go

SEED, STEPS, GLOBAL, WARMUP = 7, 20, 24, 4


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(make_rows(60)))
    (folder / "val.json").write_text(json.dumps(make_rows(7, seed=1)))
    return folder


def finetune(llama: Path, files: Path, out: Path, *flags: object) -> list[dict[str, str]]:
    """Run the command; the lines of its metrics file."""
    options = {
        "--data": "JSON",
        "--data.json_path": files,
        "--data.mask_prompt": "true",
        "--out_dir": out,
        "--precision": "32-true",
        "--seed": SEED,
        "--lora_dropout": 0,
        "--train.max_steps": STEPS,
        "--train.global_batch_size": GLOBAL,
        "--train.lr_warmup_steps": WARMUP,
        "--optimizer.lr": 0.01,
        "--eval.max_new_tokens": 4,
        "--accelerator": "cpu",
    }
    words = [str(w) for pair in options.items() for w in pair]
    main(["finetune", "lora", str(llama), *words, *map(str, flags)])
    return read_metrics(out)


def read_metrics(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def losses(metrics: list[dict[str, str]]) -> list[float]:
    return [float(m["loss"]) for m in metrics if m["loss"]]


def reference(
    llama: Path, files: Path, start: Path, targets: list[str], scheme: str | None = None, **options: bool
) -> list[float]:
    """The same run in `peft`: every step one padded batch."""
    rows = JSON(str(files), mask_prompt=True).load(Tokenizer(llama), llama, 256).train
    quantized = {"quantization_config": bits(scheme), "device_map": "cpu"} if scheme else {}
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, **quantized)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config).train()
    set_peft_model_state_dict(model, load_file(start / "adapter_model.safetensors"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    curve = []
    for step, numbers in enumerate(steps_of_rows(len(rows), GLOBAL, 10, SEED)):
        if step == STEPS:
            break
        longest = int(rows.lengths[numbers].max())
        ids, labels, mask = (torch.full((len(numbers), longest), fill) for fill in (0, -100, 0))
        for i, number in enumerate(numbers):
            row, marks = rows.row(number)
            ids[i, : len(row)], mask[i, : len(row)] = row.long(), 1
            labels[i, : len(row)] = torch.where((marks & IN_LOSS).bool(), row.long(), -100)
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        curve.append(float(loss))
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, WARMUP, 0.01, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    return curve


def bits(scheme: str) -> BitsAndBytesConfig:
    if scheme == "bnb.int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, _, double = scheme.removeprefix("bnb.").partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double == "dq",
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.mark.parametrize("everything", some([False, True], True))
def test_loss_curve_of_peft(llama, files, tmp_path, everything):
    flags = [w for t in ("key", "projection", "mlp", "head") for w in (f"--lora_{t}", "true")] if everything else []
    targets = [
        "q_proj",
        "v_proj",
        *(["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"] if everything else []),
    ]
    first = ["--train.max_steps", 1, "--optimizer.lr", 1e-30]  # the adapter as it is drawn
    finetune(llama, files, tmp_path / "start", *flags, *first)
    expected = reference(llama, files, tmp_path / "start" / "final", targets)
    assert expected[-1] < expected[0] - 0.5
    for micro in (1, 3, 8):
        out = tmp_path / f"micro-{micro}"
        curve = losses(finetune(llama, files, out, "--train.micro_batch_size", micro, "--train.epochs", 10, *flags))
        assert curve == pytest.approx(expected, abs=1e-4), f"micro batch {micro}"


@pytest.mark.parametrize(
    ("flags", "options", "scheme", "close"),
    [
        pytest.param(["--lora_variant", "rslora"], {"use_rslora": True}, None, 1e-4, marks=pytest.mark.long),
        (["--lora_variant", "dora"], {"use_dora": True}, None, 1e-4),
        ([], {}, "bnb.nf4", 1e-3),
        *(
            pytest.param([], {}, f"bnb.{kind}", 1e-3, marks=pytest.mark.long)
            for kind in ("int8", "nf4-dq", "fp4", "fp4-dq")
        ),
        pytest.param(["--lora_variant", "dora"], {"use_dora": True}, "bnb.nf4", 1e-3, marks=pytest.mark.long),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_loss_curves_of_variants_and_of_quantized_bases(llama, files, tmp_path, flags, options, scheme, close):
    if scheme:
        pytest.importorskip("bitsandbytes")
        flags = [*flags, "--quantize", scheme]
    flags = [*flags, "--train.epochs", 10]
    finetune(llama, files, tmp_path / "start", *flags, "--train.max_steps", 1, "--optimizer.lr", 1e-30)
    start = tmp_path / "start" / "final"
    expected = reference(llama, files, start, ["q_proj", "v_proj"], scheme, **options)
    curve = losses(finetune(llama, files, tmp_path / "out", "--train.micro_batch_size", 3, *flags))
    assert curve == pytest.approx(expected, abs=close)
    if scheme or "dora" in flags:  # the base in full would not have done
        plain = reference(llama, files, start, ["q_proj", "v_proj"]) if not options else [9.0]
        assert max(abs(a - b) for a, b in zip(plain, expected)) > close


def counted(used: Counter[str], name: str, function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        used[name] += 1
        return function(*args)

    return call


def plain_loss(self: LossModel, batch: Batch) -> torch.Tensor:
    logits = self.gpt(batch.ids, batch.seqlens)[0].float()
    return F.cross_entropy(logits, batch.targets[0], reduction="sum", ignore_index=UNTRAINED)


@pytest.mark.parametrize("method", ["full", "full-bf16", "lora", pytest.param("lora-bf16", marks=pytest.mark.long)])
def test_fast_paths_leave_the_curve(base, rows_file, tmp_path, monkeypatch, method):
    """All that is written out for a CPU, also where so small a model would not need it, and torch's own functions."""
    # AdamW would not see a gradient of the wrong size, and make a step of mere rounding
    flags = ["--train.max_steps", 8, "--optimizer", "SGD", "--optimizer.lr", 0.2 if "lora" in method else 0.01]
    flags += ["--lora_dropout", 0] if "lora" in method else []  # what it draws depends on the shapes
    used: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(kernels_cpu, "LARGE", 0)
        patch.setattr(kernels_cpu, "NORM_SIZE", 0)
        patch.setattr(kernels_cpu, "TINY", 0)
        patch.setattr(kernels_cpu, "matmul", counted(used, "matmul", kernels_cpu.matmul))
        for function in (kernels_cpu.RMSNorm, kernels_cpu.CausalAttention):
            patch.setattr(function, "apply", counted(used, function.__name__, function.apply))
        assert go(method, base, rows_file, tmp_path / "fast", *flags) == 0
    assert used["CausalAttention"] > 100 and used["RMSNorm"] > 100
    assert (used["matmul"] > 100) == ("bf16" not in method and kernels_cpu.onednn())
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "enabled", False)
        patch.setattr(LossModel, "forward", plain_loss)
        assert go(method, base, rows_file, tmp_path / "plain", *flags) == 0
    fast, plain = (losses(read_metrics(tmp_path / name)) for name in ("fast", "plain"))
    close = {"rel": 2**-8} if "bf16" in method else {"abs": 1e-5}  # as a number is rounded in bfloat16
    assert len(fast) == 8 and fast == pytest.approx(plain, **close) and fast[-1] < fast[0] - 0.1


def test_what_a_run_leaves(llama, files, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = finetune(llama, files, out, "--train.save_interval", 6, "--eval.interval", 5)
    printed = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} >= {
        "final",
        "step-000006",
        "step-000012",
        "metrics.csv",
        "hyperparameters.yaml",
    }
    assert {p.name for p in (out / "final").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "prompt_style.yaml", "hyperparameters.yaml", "parity.json", "chat_template.jinja",
        "checksums.json", "README.md", "run.lock",
    }  # fmt: skip
    assert {p.name for p in out.glob(".*")} == {".litgpt.json"}, "temporary files are left"
    val = [(int(m["step"]), float(m["val_loss"])) for m in metrics if m["val_loss"]]
    steps = len(losses(metrics))
    assert steps == math.ceil(60 * 5 / GLOBAL) == 13
    assert [s for s, _ in val] == [0, 5, 10, 13] and val[-1][1] < val[0][1]
    assert re.search(rf"validation loss +{val[0][1]:.4f} -> {val[-1][1]:.4f}", printed)
    assert "example, before" in printed and "example, after" in printed
    assert f"litgpt merge_lora {out / 'final'}" in printed
    assert "0 truncated, 0 skipped" in printed

    fields = json.loads((out / "final" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(llama.resolve()) and fields["r"] == 8

    with pytest.raises(SystemExit):
        finetune(llama, files, out)
    assert "--overwrite true" in capsys.readouterr().err

    settings = out / "final" / "hyperparameters.yaml"
    main(["finetune", "lora", "--config", str(settings), "--out_dir", str(tmp_path / "again")])
    again = read_metrics(tmp_path / "again")
    assert losses(again) == losses(metrics)
    weights = [load_file(o / "final" / "adapter_model.safetensors") for o in (out, tmp_path / "again")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "16-true"])
def test_precisions(llama, files, tmp_path, precision):
    exact = losses(finetune(llama, files, tmp_path / "exact", "--train.max_steps", 6))
    curve = losses(finetune(llama, files, tmp_path / "out", "--train.max_steps", 6, "--precision", precision))
    assert curve == pytest.approx(exact, abs=0.1) and curve != exact


def test_warm_up_longer_than_the_run(llama, files, tmp_path, capsys):
    metrics = finetune(llama, files, tmp_path / "out", "--train.max_steps", 10, "--train.lr_warmup_steps", 50)
    assert "shortened to 1" in capsys.readouterr().out
    rates = [float(m["lr"]) for m in metrics if m["lr"]]
    assert rates[0] == rates[1] == 0.01 and rates == sorted(rates, reverse=True)


def test_limits(llama, files, tmp_path):
    metrics = finetune(llama, files, tmp_path / "tokens", "--train.max_tokens", 9000)
    steps = [m for m in metrics if m["loss"]]
    assert int(steps[-1]["tokens"]) >= 9000 > int(steps[-2]["tokens"])
    metrics = finetune(llama, files, tmp_path / "time", "--train.max_time", 1e-6)
    assert len(losses(metrics)) == 1


def test_clipping(llama, files, tmp_path):
    free, clipped = (
        losses(
            finetune(
                llama, files, tmp_path / name, "--train.max_steps", 4, "--optimizer", "SGD", "--optimizer.lr", 1, *flags
            )
        )
        for name, flags in (("free", []), ("clipped", ["--train.max_norm", 1e-6]))
    )
    assert clipped[0] == free[0]
    assert clipped[3] == pytest.approx(clipped[0], abs=0.2) and free != clipped


def test_dropout_and_seed(llama, files, tmp_path):
    def run(name: str, *flags: object) -> list[float]:
        return losses(finetune(llama, files, tmp_path / name, "--train.max_steps", 3, "--lora_dropout", 0.5, *flags))

    assert run("a") == run("b")
    assert run("a2", "--seed", 8) != run("a3")


def test_tokenizing_is_shown_and_its_file_is_for_everybody(llama, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("litgpt.train.progress.SECONDS", 0)
    monkeypatch.setattr("litgpt.data.token_maker.AT_ONCE", 20)
    before = os.umask(0o022)
    try:
        finetune(llama, files, tmp_path / "a folder", "--train.max_steps", 1)
    finally:
        os.umask(before)
    printed = capsys.readouterr().out
    assert "rows tokenized: 40\n" in printed
    assert f"litgpt merge_lora '{tmp_path / 'a folder' / 'final'}'\n" in printed
    (*_, file) = (tmp_path / "cache").rglob("*.safetensors")
    assert os.name == "nt" or file.stat().st_mode & 0o777 == 0o644
    finetune(llama, files, tmp_path / "again", "--train.max_steps", 1)
    assert "rows tokenized" not in capsys.readouterr().out, "the tokens were there"


def test_a_loss_that_is_not_finite_stops_the_run(llama, files, tmp_path, capsys):
    import shutil

    from safetensors.torch import save_file

    broken = shutil.copytree(llama, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        finetune(broken, files, tmp_path / "out")
    assert stop.value.code == 2 and "Loss is NaN at step 1" in capsys.readouterr().err
    assert not (tmp_path / "out" / "final").exists()
