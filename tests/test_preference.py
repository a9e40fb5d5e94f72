"""Preference training: formulas, rows, and that neither micro-batches, devices, nor a stop change the numbers."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from litgpt.__main__ import main
from litgpt.data.preferences import make_batch
from litgpt.data.tokens import ANSWER, IN_LOSS, REJECTED
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.train.objectives import KTO, OBJECTIVES, Preference, PreferenceArgs, log1mexp
from tests.conftest import some
from tests.ranks import ended, start
from tests.runs import lines, same, weights

LOSSES = ("sigmoid", "robust", "ipo", "hinge", "sigmoid_norm", "apo_zero")
BETA, SMOOTHING, GAMMA = 0.3, 0.1, 0.5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{loss: ("dpo", {"loss": loss} | ({"label_smoothing": SMOOTHING} if loss == "robust" else {})) for loss in LOSSES},
    "cpo": ("cpo", {"label_smoothing": SMOOTHING}),
    "simpo": ("simpo", {"gamma": GAMMA}),
    "orpo": ("orpo", {}),
}
LENGTHS = torch.tensor([3.0, 5.0, 2.0, 7.0])  # tokens of the answers of two pairs
REFERENCE = torch.tensor([-4.0, -6.0, -3.0, -9.0], dtype=torch.float64)


def objective(name: str, **options: Any) -> Preference:
    return OBJECTIVES[name](name, PreferenceArgs(beta=BETA, **options))  # type: ignore[index, arg-type]


def batch_of(lengths: torch.Tensor, reference: torch.Tensor, rejected: list[bool]) -> Any:
    """Sequences with two tokens of prompt, and answers of these lengths."""
    sequences = []
    for n, bad in zip(lengths.int().tolist(), rejected):
        mask = torch.tensor([0, 0, *[IN_LOSS | ANSWER] * n], dtype=torch.uint8) | (REJECTED if bad else 0)
        sequences.append((torch.arange(n + 2, dtype=torch.int32), mask))
    return make_batch(sequences, reference, is_empty=False)


def token_losses_of(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Losses of tokens whose sums are these log-probabilities."""
    return torch.repeat_interleave(-logps / lengths, lengths.long())


def expected(name: str, options: dict[str, Any], logps: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of the pairs, by the formulas of the papers."""
    lengths, b, e = LENGTHS.double(), BETA, SMOOTHING
    (yc, yr), (rc, rr), (nc, nr) = (x.view(-1, 2).T for x in (logps, REFERENCE, lengths))
    u, v = yc - rc, yr - rr
    sigma = torch.sigmoid
    by_loss = {
        "sigmoid": lambda: -sigma(b * (u - v)).log(),
        "robust": lambda: (-(1 - e) * sigma(b * (u - v)).log() + e * sigma(-b * (u - v)).log()) / (1 - 2 * e),
        "ipo": lambda: (u / nc - v / nr - 1 / (2 * b)) ** 2,
        "hinge": lambda: (1 - b * (u - v)).clamp(min=0),
        "sigmoid_norm": lambda: -sigma(b * (u / nc - v / nr)).log(),
        "apo_zero": lambda: 1 - sigma(b * u) + sigma(b * v),
        "cpo": lambda: -(1 - e) * sigma(b * (yc - yr)).log() - e * sigma(-b * (yc - yr)).log(),
        "simpo": lambda: -sigma(b * yc / nc - b * yr / nr - GAMMA).log(),
    }
    if name == "orpo":
        p, q = (yc / nc).exp(), (yr / nr).exp()
        return (-b * sigma((p / (1 - p)).log() - (q / (1 - q)).log()).log()).sum()
    return by_loss[options.get("loss", name)]().sum()


@pytest.mark.parametrize("case", CASES)
def test_formulas(case):
    """Values and gradients in float64; then the gradients by finite differences."""
    name, options = CASES[case]
    made, batch = objective(name, **options), batch_of(LENGTHS, REFERENCE, [False, True] * 2)
    logps = torch.tensor([-5.0, -4.0, -2.5, -9.5], dtype=torch.float64, requires_grad=True)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        return made.loss(token_losses_of(logps, LENGTHS), batch)[0]

    right = expected(name, options, logps)
    torch.testing.assert_close(loss(logps), right)
    ours, theirs = (torch.autograd.grad(value, logps)[0] for value in (loss(logps), right))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(loss, logps)
    *sums, n = made.take_sums(torch.device("cpu")).tolist()
    assert n % 2 == 0 and len(sums) == len(made.metrics)


def test_kto_formula():
    """Desirable and undesirable answers, with weights and a KL divergence, which is not differentiated."""
    made = objective("kto", desirable_weight=1.5, undesirable_weight=0.5)
    assert isinstance(made, KTO)
    made.kl = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    bad = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    batch = batch_of(LENGTHS, REFERENCE, bad.bool().tolist())
    logps = torch.tensor([-5.0, -4.0, -2.5, -9.5], dtype=torch.float64, requires_grad=True)
    (total,) = made.loss(token_losses_of(logps, LENGTHS), batch)
    score = BETA * (logps - REFERENCE - 0.7)
    right = (1.5 * (1 - bad) * (1 - score.sigmoid()) + 0.5 * bad * (1 - (-score).sigmoid())).sum()
    torch.testing.assert_close(total, right)
    torch.testing.assert_close(*(torch.autograd.grad(value, logps)[0] for value in (total, right)))
    values = made.values(made.take_sums(torch.device("cpu")).tolist())
    rewards = BETA * (logps - REFERENCE)
    assert values["rewards/chosen"] == pytest.approx(float(rewards[[0, 3]].mean()))
    assert values["rewards/margins"] == pytest.approx(float(rewards[[0, 3]].mean() - rewards[[1, 2]].mean()))
    assert values["logps/rejected"] == pytest.approx(-3.25) and values["kl"] == pytest.approx(0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [*CASES, "kto"])
def test_extreme_probabilities(case, dtype):
    """No NaN and no infinity for log-probabilities from -1e-12 to -1e4."""
    name, options = CASES.get(case, ("kto", {}))
    made = objective(name, **options)
    ones = torch.ones(2)
    for a in (0.0, -1e-12, -1e-7, -1e-3, -1.0, -40.0, -1e4):
        for b in (0.0, -1e-12, -1e-7, -1e-3, -1.0, -40.0, -1e4):
            losses = torch.tensor([-a, -b], dtype=dtype, requires_grad=True)
            total = made.loss(losses, batch_of(ones, torch.tensor([-1.0, -2.0], dtype=dtype), [False, True]))[0]
            (grad,) = torch.autograd.grad(total, losses)
            assert total.isfinite() and grad.isfinite().all(), (a, b)


def test_log1mexp():
    x = -torch.logspace(-12, 4, 60, dtype=torch.float64)
    right = torch.tensor([math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()])
    torch.testing.assert_close(log1mexp(x), right.double())


def test_options():
    for name, options, named in (
        ("dpo", {"beta": 0.0}, "beta"),
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing"),
        ("dpo", {"loss": "robust", "label_smoothing": 0.5}, "label_smoothing"),
        ("dpo", {"gamma": 1.0}, "gamma"),
        ("kto", {"sft_weight": 0.1}, "sft_weight"),
        ("cpo", {"reference": "base"}, "reference"),
        ("orpo", {"loss": "ipo"}, "loss"),
        ("simpo", {"undesirable_weight": 2.0}, "undesirable_weight"),
    ):
        with pytest.raises(UserError, match=f"--preference.{named}"):
            PreferenceArgs(**options).check(name)  # type: ignore[arg-type]


# the head


@pytest.mark.parametrize("trained", [False, True])
def test_token_losses(trained, monkeypatch):
    """The loss of each token, and gradients for any weights, also if the head is trained and chunked."""
    from litgpt.train import loss as module

    monkeypatch.setattr(module, "logits_at_once", lambda x: 40)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(6, 20), torch.randn(70, 6, requires_grad=True)
    head.requires_grad_(trained)
    targets = torch.randint(20, (70,))
    positions = torch.arange(3, 67)
    weights = torch.randn(64)
    ours = module.token_losses(hidden, head, targets, positions)
    theirs = F.cross_entropy(head(hidden[positions]), targets[positions], reduction="none")
    torch.testing.assert_close(ours, theirs)
    inputs = [hidden, *(head.parameters() if trained else ())]
    for a, b in zip(*(torch.autograd.grad((value * weights).sum(), inputs) for value in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# runs


def text(g: torch.Generator, least: int = 2) -> str:
    n = int(torch.randint(least, 14, (1,), generator=g))
    return "".join(chr(97 + int(c)) for c in torch.randint(26, (n,), generator=g))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = torch.Generator().manual_seed(1)
    file = tmp_path_factory.mktemp("rows") / "pairs.json"
    file.write_text(json.dumps([{"prompt": text(g), "chosen": text(g), "rejected": text(g)} for _ in range(40)]))
    return file


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = torch.Generator().manual_seed(2)
    rows = [{"prompt": text(g), "completion": text(g), "label": i % 3 > 0} for i in range(40)]
    file = tmp_path_factory.mktemp("rows") / "labels.json"
    file.write_text(json.dumps(rows))
    return file


METHODS = {
    "lora": [],
    "rslora": ["--lora_variant", "rslora"],
    "dora": ["--lora_variant", "dora"],
    "lora on all layers": ["--lora_mlp", "true", "--lora_head", "true"],
    "nf4": ["--quantize", "bnb.nf4"],
    "adapter": ["--method", "adapter"],
    "adapter_v2": ["--method", "adapter_v2"],
    "full": ["--method", "full"],
}


def command(name: str, base: Path, rows: Path, out: Path, *flags: object) -> list[str]:
    options = f"--precision 32-true --accelerator cpu --train.max_steps 4 --train.global_batch_size 8 --out_dir {out} "
    options += "--optimizer.lr 0.003 --train.epochs 9 --train.lr_warmup_steps 0 --data.val_split_fraction 0.1 "
    options += "--eval.max_new_tokens null --train.lr_schedule constant --train.micro_batch_size 4"
    return ["finetune", name, str(base), str(rows), *options.split(), *map(str, flags)]


def finetune(*args: Any) -> list[dict[str, str]]:
    main(command(*args))
    return lines(args[3])


def curve(found: list[dict[str, str]]) -> list[float]:
    return [float(line["loss"]) for line in found if line["loss"]]


@pytest.mark.parametrize("method", some(METHODS, "full", "nf4"))
@pytest.mark.parametrize("name", some([*LOSSES, "kto"], "sigmoid", "ipo", "kto"))
def test_the_first_step(name, method, base, pairs, labels, tmp_path):
    """Before anything is learned, the model is its reference."""
    if "--quantize" in METHODS[method]:
        pytest.importorskip("bitsandbytes")
    flags = [*METHODS[method], "--train.max_steps", 1, "--preference.beta", 0.2]
    if name == "kto":
        found = finetune("kto", base, labels, tmp_path / "out", *flags)
    else:
        found = finetune("dpo", base, pairs, tmp_path / "out", *flags, "--preference.loss", name)
    right = {"hinge": 1.0, "apo_zero": 1.0, "ipo": (1 / 0.4) ** 2, "kto": 0.5}.get(name, math.log(2))
    assert float(found[0]["val_loss"]) == pytest.approx(right, abs=1e-6)
    assert curve(found) == [pytest.approx(right, abs=1e-6)]


@pytest.mark.parametrize("reference", ["start", "base"])
def test_an_adapter_that_is_trained_further(reference, base, pairs, rows_file, tmp_path):
    """The reference is the base with the adapter, unless it is to be the bare base."""
    sft = f"finetune lora {base} {rows_file} --precision 32-true --optimizer.lr 0.01 --train.max_steps 6 "
    main([*sft.split(), "--out_dir", str(tmp_path / "sft"), "--eval.max_new_tokens", "null"])
    flags = ["--train.max_steps", 1, "--preference.reference", reference]
    (loss,) = curve(finetune("dpo", tmp_path / "sft" / "final", pairs, tmp_path / "out", *flags))
    assert (loss == pytest.approx(math.log(2), abs=1e-6)) == (reference == "start")
    (other,) = curve(
        finetune("dpo", base, pairs, tmp_path / "o", *flags[:2], "--preference.reference", tmp_path / "sft/final")
    )
    assert other != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("name", some(["dpo", "kto", "orpo", "simpo", "cpo"], "kto"))
def test_micro_batches_change_nothing(name, base, pairs, labels, tmp_path):
    """Neither the losses nor the gradients, which SGD with a rate of 1 adds to the weights."""
    rows = labels if name == "kto" else pairs
    sgd = ["--method", "full", "--optimizer", "SGD", "--optimizer.lr", 1, "--train.max_steps", 1]
    for micro in (1, 3, 8):
        finetune(name, base, rows, tmp_path / f"sgd{micro}", *sgd, "--train.micro_batch_size", micro, *BATCH)
        found = finetune(
            name, base, rows, tmp_path / str(micro), "--method", "full", "--train.micro_batch_size", micro, *BATCH
        )
        if micro == 1:
            first = curve(found)
            assert first[3] < first[0]
        assert curve(found) == pytest.approx(first, abs=1e-5)
        for key, weight in weights(tmp_path / f"sgd{micro}").items():
            torch.testing.assert_close(weight, weights(tmp_path / "sgd1")[key], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("case", some(["dpo fsdp", "dpo ddp", "kto fsdp", "orpo fsdp", "kto ddp"]))
def test_two_devices(case, base, pairs, labels, tmp_path, monkeypatch):
    name, strategy = case.split()
    rows = labels if name == "kto" else pairs
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))  # so that the reference is computed on two devices
    words = command(name, base, rows, tmp_path / "two", "--method", "full", "--devices", 2, "--strategy", strategy)
    ended(start(tmp_path, [*words, "--train.micro_batch_size", "2"]))
    one = finetune(name, base, rows, tmp_path / "one", "--method", "full", "--train.micro_batch_size", 2)
    two = lines(tmp_path / "two")
    for key in (key for key in one[0] if key in ("loss", "val_loss", "kl") or "/" in key):
        ours, theirs = ([float(line[key] or "nan") for line in found] for found in (two, one))
        assert ours == pytest.approx(theirs, abs=2e-5, nan_ok=True), key


BATCH = ["--train.global_batch_size", 24]  # which 1, 3, and 8 divide
RESUMED = {
    "dpo full": ["--method", "full"],
    "dpo lora": ["--lora_dropout", "0.2"],
    "kto full": ["--method", "full"],
    "kto lora": [],
    "orpo adapter_v2": ["--method", "adapter_v2"],
}


@pytest.mark.parametrize("case", some(RESUMED, "dpo full"))
def test_resume(case, base, pairs, labels, tmp_path, monkeypatch):
    """Bit for bit, also if the reference was not kept, which is then not computed with the trained weights."""
    name, flags = case.split()[0], RESUMED[case]
    rows = labels if name == "kto" else pairs
    main(command(name, base, rows, tmp_path / "whole", *flags))
    with pytest.raises(SystemExit):
        main(command(name, base, rows, tmp_path / "out", *flags, "--train.pause_after", 2))
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    main(command(name, base, rows, tmp_path / "out", *flags, "--resume", "true"))
    same(tmp_path / "out", tmp_path / "whole")


def test_the_reference_is_computed_once(base, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(GPT, "hidden", counting := Counting(GPT.hidden))
    finetune("dpo", base, pairs, tmp_path / "a", "--train.max_steps", 1)
    first, counting.n = counting.n, 0
    finetune("dpo", base, pairs, tmp_path / "b", "--train.max_steps", 1)
    assert counting.n < first
    (file,) = (tmp_path / "cache").rglob("reference-*.safetensors")
    finetune(
        "dpo", base, pairs, tmp_path / "c", "--train.max_steps", 1, "--quantize", "bnb.nf4", "--preference.beta", 1
    )
    assert len(list(file.parent.glob("reference-*"))) == 2
    file.write_bytes(b"damaged")
    found = finetune("dpo", base, pairs, tmp_path / "d", "--train.max_steps", 1)
    assert curve(found) == [pytest.approx(math.log(2), abs=1e-6)]


class Counting:
    def __init__(self, function: Any) -> None:
        self.function, self.n = function, 0

    def __get__(self, owner: Any, kind: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.n += 1
            return self.function(owner, *args, **kwargs)

        return call


def test_metrics(base, pairs, tmp_path, capsys):
    """In the file, and in words; learned until the chosen answers win."""
    found = finetune("dpo", base, pairs, tmp_path / "out", "--method", "full", "--train.max_steps", 12)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    with open(tmp_path / "out" / "metrics.csv", newline="") as f:
        header = next(csv.reader(f))
    assert all(name in header and f"val_{name}" in header for name in names)
    for line in found:
        prefix = "val_" if line["val_loss"] else ""
        chosen, rejected, margin = (float(line[f"{prefix}rewards/{key}"]) for key in ("chosen", "rejected", "margins"))
        assert margin == pytest.approx(chosen - rejected, abs=1e-5)
    accuracies = [float(line["rewards/accuracies"]) for line in found if line["loss"]]
    assert accuracies[0] == 0 and accuracies[-1] > 0.9
    out = capsys.readouterr().out
    assert "reward accuracy" in out and "perplexity" not in out


def test_the_remark_about_falling_log_probabilities():
    before = {"logps/chosen": -10.0, "logps/rejected": -12.0, "rewards/margins": 0.0}
    fell = {"logps/chosen": -11.0, "logps/rejected": -20.0, "rewards/margins": 0.7}
    (remark,) = objective("dpo").remarks([before, fell])
    assert "--preference.sft_weight" in remark
    assert not objective("dpo").remarks([before, fell | {"logps/chosen": -9.0}])
    assert not objective("dpo", sft_weight=0.1).remarks([before, fell])
    assert not objective("dpo").remarks([before])


@pytest.mark.long
def test_kto_extended(base, labels, tmp_path):
    """More epochs: the reference of the mismatched answers is that of the same pairs, whatever steps there were."""
    words = [
        "--method",
        "full",
        "--train.max_steps",
        "null",
        "--train.save_interval",
        1,
        "--train.global_batch_size",
        16,
    ]
    out = tmp_path / "out"
    main(command("kto", base, labels, out, *words, "--train.epochs", 1))
    main(command("kto", base, labels, out, *words, "--train.epochs", 2, "--resume", "true"))
    divergences = [float(line["kl"]) for line in lines(out) if line["loss"]]
    assert len(divergences) > 5 and all(0 <= kl < 60 for kl in divergences) and any(divergences[3:])


def test_kto_of_single_rows(base, labels, tmp_path):
    """A step of one row has no KL divergence."""
    found = finetune(
        "kto", base, labels, tmp_path / "out", "--train.global_batch_size", 1, "--train.micro_batch_size", 1
    )
    assert all(float(line["kl"]) == 0 for line in found if line["loss"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--method", "full", "--lora_r", 4], "lora_r"),
        (["--adapter_prompt_length", 4], "adapter_prompt_length"),
        (["--train.pack", "true"], "train.pack"),
        (["--preference.reference", "nowhere"], "nowhere"),
        (["--preference.gamma", 1], "preference.gamma"),
    ],
)
def test_refused(flags, named, base, pairs, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        finetune("dpo", base, pairs, tmp_path / "out", *flags)
    assert e.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_rows(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "dpo", str(base), "--out_dir", str(tmp_path / "out")])
    assert "--data" in capsys.readouterr().err
