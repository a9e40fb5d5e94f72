"""Stochastic rounding, Muon, groups, states that come back exactly, and every optimizer that has a short name."""

import copy
import functools
import json
import math
from collections import defaultdict

import pytest
import torch
import yaml
from torch import nn

import litgpt.train.optimizers as optimizers
from litgpt.__main__ import main
from litgpt.cli.schema import load_class
from litgpt.families import read_config
from litgpt.methods.lora import LoRA, lora_layers
from litgpt.model.gpt import GPT
from litgpt.train.optimizers import (
    SHORT_NAMES,
    AdamW,
    Muon,
    StochasticRounding,
    finished,
    orthogonal,
    ours,
    parameter_groups,
    remarks,
    round_stochastically_,
)
from tests.test_training import losses, read_metrics

FIELDS = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def tiny(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    model = GPT(read_config(FIELDS, name="tiny"))
    model.reset_parameters()
    return model.to(dtype)


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (3,), ())]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


# rounding


def test_rounding_is_right_on_average_and_goes_to_a_neighbour():
    dice = StochasticRounding(torch.Generator().manual_seed(0))
    values = torch.tensor([1.001, -1.001, 3.0, 1e-30, -0.3])
    drawn = round_stochastically_(values.repeat(20_000, 1), dice).double()
    nearest = values.bfloat16().double()
    for i, value in enumerate(values.double()):
        neighbours = drawn[:, i].unique()
        assert len(neighbours) == (1 if value == 3.0 else 2)
        assert neighbours.min() <= value <= neighbours.max()
        step = float(neighbours.max() - neighbours.min())
        assert float(drawn[:, i].mean()) == pytest.approx(float(value), abs=step / 50 + 1e-40)
    assert (nearest[:2] == torch.tensor([1.0, -1.0])).all()  # nearest would lose the thousandth


def test_rounding_keeps_what_is_not_finite():
    bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # the NaN of GPUs: adding to it overflows
    values = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), bits])
    rounded = round_stochastically_(values, StochasticRounding(torch.Generator().manual_seed(0)))
    assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2:].isnan().all()


def test_throws_are_even_and_do_not_depend_on_each_other():
    """Over lanes, and within a lane from one throw to the next: weights, moments and chunks follow each other there."""
    dice = StochasticRounding(torch.Generator().manual_seed(0))
    throws = torch.stack([dice.draw(2**14) for _ in range(48)])  # (throws, lanes)
    assert int(throws.min()) >= 0 and int(throws.max()) < 2**16
    for bit in range(16):
        assert float((throws >> bit & 1).float().mean()) == pytest.approx(0.5, abs=3e-3)
    centred = (throws.double() - 32767.5) / (65536 / 12**0.5)
    related = torch.stack([(centred[lag:] * centred[: 48 - lag]).mean() for lag in range(1, 24)])
    beside = torch.stack([(centred[:, lag:] * centred[:, :-lag]).mean() for lag in range(1, 24)])
    assert max(related.abs().max(), beside.abs().max()) < 7e-3  # five standard errors
    # the squares too: no pattern in which three that follow each other fall into the same eighth
    eighths = throws[:48].view(16, 3, -1) >> 13
    counts = (eighths[:, 0] * 64 + eighths[:, 1] * 8 + eighths[:, 2]).flatten().bincount(minlength=512).double()
    expected = counts.sum() / 512
    assert float(((counts - expected) ** 2 / expected).sum()) < 512 + 5 * (2 * 511) ** 0.5


def test_small_updates_are_not_lost():
    """A thousand steps of 1e-5 from 1, where bfloat16 has steps of 4e-3."""
    ends = {}
    for name, cls in (("nearest", torch.optim.AdamW), ("stochastic", AdamW)):
        p = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
        optimizer = cls([p], lr=1e-5, weight_decay=0.0)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[name] = float(p.detach().double().mean())
    assert ends["nearest"] == 1.0
    assert ends["stochastic"] == pytest.approx(0.99, abs=5e-4)


# AdamW


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.3}], ids=str)
def test_adamw_without_rounding_is_torchs(monkeypatch, options):
    """The bfloat16 path on float32 weights: the same update."""
    params, expected = parameters(torch.float32), parameters(torch.float32)
    reference = torch.optim.AdamW(expected, lr=0.01, betas=(0.8, 0.9), **options)
    group = torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.9), **options).param_groups[0]
    states: dict = defaultdict(dict)
    monkeypatch.setattr(optimizers, "CHUNK", {"cpu": 11})  # rows in several chunks
    for step in range(5):
        give_gradients(params, step)
        give_gradients(expected, step)
        reference.step()
        with torch.no_grad():
            optimizers.adamw_step(params, states, group, group["eps"], {})
    for p, q in zip(params, expected):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.3}], ids=str)
@pytest.mark.parametrize("chunk", [11, 23, 2**18])
def test_each_bfloat16_number_is_a_neighbour_of_the_exact_one(chunk, options, monkeypatch):
    """Weights and moments after one step from the same state, in buckets that hold some rows or several weights, with
    gradients in another layout."""
    monkeypatch.setattr(optimizers, "CHUNK", {"cpu": chunk})
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params, lr=0.01, betas=(0.8, 0.9), **options)
    for step in range(4):
        exact = [nn.Parameter(p.detach().float()) for p in params]
        reference = torch.optim.AdamW(exact, lr=0.01, betas=(0.8, 0.9), **options)
        for p, q in zip(params, exact) if step else ():
            reference.state[q] = {k: t.clone().float() for k, t in optimizer.state[p].items()}
        give_gradients(params, step)
        for p, q in zip(params, exact):
            p.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        for p, q in zip(params, exact):
            ours, theirs = {"p": p, **optimizer.state[p]}, {"p": q, **reference.state[q]}
            assert ours.keys() == theirs.keys()
            for k, t in ours.items():
                assert (t.float() - theirs[k]).abs().le(theirs[k].abs() * 2**-7 + 1e-30).all(), k


def test_few_operations_update_many_weights():
    """A GPU starts a kernel for each: about ten for a bucket, however many weights are in it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            names.extend([function.__name__] * (not function.is_view and "empty" not in function.__name__))
            return result

    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 8, generator=generator).bfloat16()) for _ in range(200)]
    optimizer = AdamW(params, lr=0.01)
    for step in range(2):
        names: list[str] = []
        give_gradients(params, step)
        with Counter():
            optimizer.step()
    counted = [n for n in names if not n.startswith(("add_.Scalar", "detach", "_local_scalar", "add_.Tensor"))]
    assert "_fused_adamw_.default" in counted and len(counted) <= 15, counted


def test_adamw_on_bfloat16_follows_float32():
    exact, rounded = parameters(torch.bfloat16), parameters(torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in exact]
    pairs = (torch.optim.AdamW(exact, lr=0.01), AdamW(rounded, lr=0.01))
    for step in range(20):
        give_gradients(exact, step)
        give_gradients(rounded, step)
        for optimizer in pairs:
            optimizer.step()
    for p, q in zip(rounded, exact):
        torch.testing.assert_close(p.float(), q, atol=0.03, rtol=0.03)
    states = pairs[1].state.values()
    assert {t.dtype for s in states for k, t in s.items() if k != "step"} == {torch.bfloat16}


def test_mixed_weights_and_gradients_that_stay():
    params = [*parameters(torch.float32), *parameters(torch.bfloat16)]
    alone = parameters(torch.float32)
    optimizer, reference = AdamW(params, lr=0.01), torch.optim.AdamW(alone, lr=0.01)
    give_gradients(params[:3], 1)
    give_gradients(params[3:], 1)
    give_gradients(alone, 1)
    grads = [p.grad for p in params]
    optimizer.step()
    reference.step()
    assert all(p.grad is g for p, g in zip(params, grads))
    assert all(torch.equal(p, q) for p, q in zip(params, alone)), "float32 weights take torch's step"
    assert not any(torch.equal(p, q) for p, q in zip(params[3:], parameters(torch.bfloat16)))


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("cls", [AdamW, Muon])
def test_state_comes_back_exactly(cls, fused, tmp_path):
    if cls is Muon and fused:
        pytest.skip("Muon has no such option")
    options = {} if cls is Muon else {"fused": fused}

    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        params = [*parameters(torch.bfloat16), *parameters(torch.float32)]
        params[0].row_blocks = (4, 3)  # type: ignore[attr-defined]
        return params, finished(cls(params, lr=0.01, **options), seed=3)

    def steps(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            give_gradients(params, number)
            optimizer.step()

    params, optimizer = make()
    steps(params, optimizer, range(3))
    weights = copy.deepcopy([p.detach() for p in params])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    steps(params, optimizer, range(3, 6))

    again, resumed = make()
    with torch.no_grad():
        for p, w in zip(again, weights):
            p.copy_(w)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(again, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, again))


def test_the_seed_decides():
    def run(seed: int) -> torch.Tensor:
        params = parameters(torch.bfloat16)
        optimizer = finished(AdamW(params, lr=0.001), seed)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        return params[0].detach()

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"fused": True}], ids=str)
def test_ours_on_float32_is_torchs(options):
    """Bit for bit, the state that is saved included."""
    params, expected = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = (cls(p, lr=0.01, **options) for cls, p in ((AdamW, params), (torch.optim.AdamW, expected)))
    for step in range(4):
        give_gradients(params, step)
        give_gradients(expected, step)
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(params, expected))
    assert all(p.grad is None for p in params)
    state, wanted = optimizer.state_dict(), reference.state_dict()
    assert state["param_groups"] == wanted["param_groups"]
    for own, theirs in zip(state["state"].values(), wanted["state"].values()):
        assert own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)


def test_what_an_optimizer_becomes():
    half = [{"params": parameters(torch.bfloat16), "lr_ratio": 4.0}]
    torchs = functools.partial(torch.optim.AdamW, lr=0.02)
    made = finished(ours(functools.partial(torchs, betas=(0.8, 0.9), weight_decay=0.3))(half), seed=5)
    assert type(made) is AdamW and made.seed == 5
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["lr_ratio"]) == (0.02, (0.8, 0.9), 0.3, 4.0)
    by_call = functools.partial(lambda cls, params, **options: cls(params, **options), torch.optim.AdamW, lr=0.02)
    made = ours(by_call)(parameters(torch.float32))
    assert type(made) is AdamW and made.param_groups[0]["lr"] == 0.02
    single = parameters(torch.float32)
    assert finished(AdamW(single), 0).param_groups[0]["fused"] is True
    assert not finished(AdamW(single, foreach=True), 0).param_groups[0]["fused"]
    assert not finished(AdamW(single), 0, fuse=False).param_groups[0]["fused"]
    assert not finished(AdamW([*single, *parameters(torch.bfloat16)]), 0).param_groups[0]["fused"]
    assert ours(torch.optim.SGD) is torch.optim.SGD and ours(Muon) is Muon


def test_remarks():
    cpu = torch.device("cpu")
    half, single = parameters(torch.bfloat16), parameters(torch.float32)
    (line,) = remarks(torch.optim.SGD(half), cpu)
    assert "SGD rounds bfloat16 weights to the nearest" in line and "32-true" in line
    assert remarks(AdamW(half), cpu) == remarks(Muon(half), cpu) == remarks(torch.optim.SGD(single), cpu) == []


# groups and Muon


def test_groups_by_ratio():
    model = tiny()
    assert [len(g["params"]) for g in parameter_groups(model)] == [len(list(model.parameters()))]
    model.transformer.wte.weight.requires_grad_(False)
    model.lm_head.weight.lr_ratio = 16.0  # type: ignore[attr-defined]
    groups = {g["lr_ratio"]: g["params"] for g in parameter_groups(model)}
    assert set(groups) == {1.0, 16.0} and groups[16.0] == [model.lm_head.weight]
    assert all(p is not model.transformer.wte.weight for p in groups[1.0])


def test_matrices_of_the_blocks():
    model = tiny()
    parameter_groups(model)
    found = {n: p.row_blocks for n, p in model.named_parameters() if hasattr(p, "row_blocks")}
    assert {n.split(".", 3)[3]: b for n, b in found.items()} == {
        "attn.qkv.weight": (16, 8, 8), "attn.proj.weight": (16,), "mlp.fc.weight": (24, 24), "mlp.proj.weight": (16,),
    }  # fmt: skip
    assert len(found) == 8


def test_matrices_of_lora():
    model = tiny()
    LoRA(r=2, query=True, value=True, mlp=True).apply(model)
    parameter_groups(model)
    layer = lora_layers(model)["transformer.h.0.attn.qkv"]
    assert layer.lora_A.row_blocks == (2, 2) and layer.lora_B.row_blocks == (16, 8)


def test_orthogonal():
    for shape in ((6, 9), (9, 6), (5, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        y = orthogonal(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        values = torch.linalg.svdvals(y)
        assert y.shape == x.shape and float(values.max()) < 1.25
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert float((y * (u @ v)).sum() / (y.norm() * (u @ v).norm())) > 0.95


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_is_torchs_on_each_block_and_adamw_elsewhere(adjust):
    model = tiny()
    groups = parameter_groups(model)
    optimizer = Muon(groups, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    matrices: dict[str, list[nn.Parameter]] = {}
    others: dict[str, nn.Parameter] = {}
    for name, p in model.named_parameters():
        if hasattr(p, "row_blocks"):
            matrices[name] = [nn.Parameter(part.clone()) for part in p.detach().split(p.row_blocks)]
        else:
            others[name] = nn.Parameter(p.detach().clone())
    reference = (
        torch.optim.Muon([p for parts in matrices.values() for p in parts], lr=0.02, adjust_lr_fn=adjust),
        torch.optim.AdamW(others.values(), lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)),
    )
    for step in range(3):
        give_gradients(list(model.parameters()), step)
        for name, p in model.named_parameters():
            if name in others:
                others[name].grad = p.grad
            else:
                for part, grad in zip(matrices[name], p.grad.split(p.row_blocks)):
                    part.grad = grad
        for o in (optimizer, *reference):
            o.step()
    for name, p in model.named_parameters():
        if name in others:
            torch.testing.assert_close(p, others[name], atol=1e-6, rtol=1e-5)
        else:  # torch iterates in bfloat16
            torch.testing.assert_close(p.detach(), torch.cat(matrices[name]).detach(), atol=4e-3, rtol=0.02)


def test_muon_refuses_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"momentum .* 1.5, lr .* -1"):
        Muon(parameters(torch.float32), lr=-1, momentum=1.5)


# by their names


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_every_short_name_steps(name):
    if "bitsandbytes" in SHORT_NAMES[name]:
        pytest.importorskip("bitsandbytes")
    params = [nn.Parameter(torch.randn(64, 80)), nn.Parameter(torch.randn(5))]
    before = [p.detach().clone() for p in params]
    options = {"momentum": 0.9} if name.startswith(("LARS", "SGD8bit")) else {}
    optimizer = load_class("optimizer", SHORT_NAMES[name])([{"params": params, "lr_ratio": 1.0}], lr=0.01, **options)
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before))


@pytest.fixture
def pretrain(llama, tmp_path, capsys):
    """Continue the tiny model on text; the losses, and what was printed."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)

    def run(name: str, *flags: object) -> tuple[list[float], str]:
        words = ["--initial_checkpoint_dir", llama, "--data", "TextFiles", "--data.train_data_path",
                 tmp_path / "text.txt", "--out_dir", tmp_path / name, "--accelerator", "cpu", "--train.max_steps", 6,
                 "--train.epochs", 20, "--train.global_batch_size", 4, "--train.max_seq_length", 64,
                 "--train.min_lr", 0, "--train.lr_warmup_steps", 0, "--optimizer.lr", 0.003]  # fmt: skip
        capsys.readouterr()
        main(["pretrain", *map(str, [*words, *flags])])
        return losses(read_metrics(tmp_path / name)), capsys.readouterr().out

    return run


def test_runs_in_bfloat16(pretrain):
    exact, _ = pretrain("exact", "--precision", "32-true")
    for name in ("AdamW", "Muon"):
        curve, printed = pretrain(name, "--precision", "bf16-true", "--optimizer", name)
        assert curve[-1] < curve[0] - 0.3 and "to the nearest" not in printed
        if name == "AdamW":
            assert curve == pytest.approx(exact, abs=0.05)
    _, printed = pretrain("sgd", "--precision", "bf16-true", "--optimizer", "SGD")
    assert "SGD rounds bfloat16 weights to the nearest value" in printed


def test_eight_bits_in_a_run(pretrain):
    pytest.importorskip("bitsandbytes")
    curve, printed = pretrain("out", "--precision", "32-true", "--optimizer", "PagedAdamW8bit")
    assert curve[-1] < curve[0] - 0.3
    assert "PagedAdamW8bit does not page on cpu" in printed


@pytest.mark.parametrize("rank", [512, 2048])
def test_large_ranks_and_sgd_with_momentum(llama, rows_file, tmp_path, rank):
    words = ["--data", "JSON", "--data.json_path", rows_file, "--out_dir", tmp_path / "out", "--precision", "32-true",
             "--accelerator", "cpu", "--lora_r", rank, "--optimizer", "SGD", "--optimizer.lr", 0.1,
             "--optimizer.momentum", 0.9, "--train.max_steps", 8, "--train.lr_warmup_steps", 2,
             "--eval.max_new_tokens", "null"]  # fmt: skip
    main(["finetune", "lora", str(llama), *map(str, words)])
    curve = losses(read_metrics(tmp_path / "out"))
    assert len(curve) == 8 and curve[-1] < curve[0]


def test_ratios_reach_the_optimizer(llama, rows_file, tmp_path, monkeypatch):
    import litgpt.train.run as module

    original, seen = module.parameter_groups, []

    def half(model: GPT) -> list[dict]:
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.lr_ratio = 16.0  # type: ignore[attr-defined]
        return original(model)

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([g["lr"] for g in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(module, "parameter_groups", half)
    monkeypatch.setattr(module, "finished", lambda o, seed, fuse: Spy(o.param_groups))
    words = ["--data", "JSON", "--data.json_path", rows_file, "--out_dir", tmp_path / "out", "--accelerator", "cpu",
             "--train.max_steps", 2, "--train.lr_warmup_steps", 2, "--train.learning_rate", 0.01,
             "--eval.max_new_tokens", "null", "--precision", "32-true"]  # fmt: skip
    main(["finetune", "lora", str(llama), *map(str, words)])
    assert seen == [[pytest.approx(0.005), pytest.approx(0.08)], [pytest.approx(0.01), pytest.approx(0.16)]]


def test_settings_of_a_run_make_it_again(pretrain, tmp_path):
    curve, _ = pretrain("one", "--precision", "bf16-true", "--optimizer", "Muon", "--train.learning_rate", 0.002,
                        "--optimizer.lr", 0.002, "--train.gradient_accumulation_iters", 2,
                        "--train.global_batch_size", 8)  # fmt: skip
    file = tmp_path / "one" / "hyperparameters.yaml"
    settings = yaml.safe_load(file.read_text())
    assert settings["optimizer"] == {"class_path": "litgpt.train.optimizers.Muon", "init_args": {"lr": 0.002}}
    assert "global_batch_size" not in settings["train"] and json.dumps(settings)
    main(["pretrain", "--config", str(file), "--out_dir", str(tmp_path / "two")])
    assert losses(read_metrics(tmp_path / "two")) == curve


@pytest.mark.long
def test_bfloat16_ends_where_float32_does(real_data, tmp_path):
    ends, text = {}, real_data / "text" / "tinyshakespeare.txt"
    for precision in ("32-true", "bf16-true"):
        words = ["--initial_checkpoint_dir", real_data / "models" / "stories260k", "--data", "TextFiles",
                 "--data.train_data_path", text, "--out_dir", tmp_path / precision,
                 "--precision", precision, "--accelerator", "cpu", "--train.max_seq_length", 256,
                 "--train.global_batch_size", 8, "--train.micro_batch_size", 8, "--train.max_steps", 300,
                 "--train.lr_warmup_steps", 20, "--train.min_lr", 0, "--eval.initial_validation", "false"]  # fmt: skip
        main(["pretrain", *map(str, words)])
        ends[precision] = float(read_metrics(tmp_path / precision)[-1]["val_loss"])
    assert ends["bf16-true"] == pytest.approx(ends["32-true"], rel=0.01)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_a_copy_steps_like_the_original(name):
    """`copy.deepcopy` and pickle keep only the fields that torch knows."""
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    original = getattr(optimizers, name)([{"params": [weight], "lr_ratio": 1.0}], lr=0.1)
    copied = copy.deepcopy(original)
    for optimizer in (original, copied):
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    assert torch.equal(original.param_groups[0]["params"][0], copied.param_groups[0]["params"][0])
    assert not torch.equal(weight, torch.ones_like(weight))
