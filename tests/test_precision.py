"""Which precision a run has by default, what it means for quantized and sharded weights, and what its result holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from litgpt.__main__ import main
from litgpt.families import read_config
from litgpt.model.devices import default_precision, default_training_precision, tf32, uses_tf32
from litgpt.model.gpt import GPT
from litgpt.train import run as module
from litgpt.train.devices import launch
from litgpt.train.resume.state import TrainingState
from tests.conftest import save_llama, some
from tests.ranks import alike, curve, ended, start
from tests.runs import go, words

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA GPU of this compute capability."""

    def make(major: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: major >= 8)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))

    return make


def test_default_precisions(gpu):
    gpu(8)
    assert default_precision(CUDA) == default_training_precision(CUDA) == "bf16-true"
    assert default_training_precision(CUDA, all_trained=True) == "bf16-mixed"
    gpu(7)  # V100 and T4
    assert default_precision(CUDA) == "16-true"
    assert default_training_precision(CUDA) == default_training_precision(CUDA, all_trained=True) == "16-mixed"
    assert default_training_precision(CPU, all_trained=True) == "32-true"


def test_tf32_is_for_mixed_precision_only(gpu):
    gpu(8)
    assert uses_tf32(CUDA, "bf16-mixed") and uses_tf32(CUDA, "16-mixed")
    assert not uses_tf32(CUDA, "32-true") and not uses_tf32(CUDA, "bf16-true") and not uses_tf32(CPU, "bf16-mixed")
    gpu(7)
    assert not uses_tf32(CUDA, "16-mixed")
    torch.set_float32_matmul_precision("medium")
    try:
        for allowed, within in ((True, "high"), (False, "highest")):
            with tf32(allowed):
                assert torch.get_float32_matmul_precision() == within
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tf32_is_on_while_steps_run_and_in_the_header(base, rows_file, tmp_path, monkeypatch, capsys):
    """The outputs of the result are computed without it: `litgpt validate` compares them."""
    during = {}

    def watched(owner, name):
        original = getattr(owner, name)

        def call(self, *args):
            during[name] = torch.get_float32_matmul_precision()
            return original(self, *args)

        monkeypatch.setattr(owner, name, call)

    watched(module.Trainer, "fit")
    watched(module.Saver, "final")
    for place in ("run", "report"):
        monkeypatch.setattr(f"litgpt.train.{place}.uses_tf32", lambda device, precision: precision == "bf16-mixed")
    for precision, expected in (("bf16-mixed", "high"), ("32-true", "highest")):
        assert go("lora", base, rows_file, tmp_path / precision, "--precision", precision) == 0
        assert during == {"fit": expected, "final": "highest"}
        assert (f"{precision}, TF32, 1 thread" in capsys.readouterr().out) == (precision == "bf16-mixed")


def test_sharded_runs_without_bfloat16(base, rows_file, tmp_path, monkeypatch):
    """FSDP cannot scale gradients: where it is needed or requested, the default is 32-true."""
    monkeypatch.setattr(module, "default_training_precision", lambda *_: "16-mixed")
    monkeypatch.setattr(launch, "layout", lambda *_: (2, 1))
    monkeypatch.setattr(module, "make_fabric", lambda *args: pytest.skip.Exception(args))
    picked = {}
    for name, memory, flags in (
        ("fits", 10**12, ()),
        ("does not fit", 1, ()),
        ("fsdp", 10**12, ("--strategy", "fsdp")),
        ("asked", 1, ("--precision", "16-mixed")),
        ("quantized", 1, ("--quantize", "bnb.nf4")),
    ):
        monkeypatch.setattr(launch, "device_memory", lambda *_, memory=memory: memory)

        def stop(device, devices, nodes, precision, strategy, offload, name=name):
            picked[name] = precision, strategy
            raise SystemExit(0)

        monkeypatch.setattr(module, "make_fabric", stop)
        line = words("lora", base, rows_file, tmp_path / "out", *flags)
        if "--precision" not in flags:
            at = line.index("--precision")
            del line[at : at + 2]
        with pytest.raises(SystemExit):
            main(line)
    assert picked == {
        "fits": ("16-mixed", "ddp"),
        "does not fit": ("32-true", "fsdp"),
        "fsdp": ("32-true", "fsdp"),
        "asked": ("16-mixed", "ddp"),
        "quantized": ("16-mixed", "ddp"),
    }


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("scheme", ["bnb.nf4", "bnb.int8"])
def test_mixed_precision_over_a_quantized_base(scheme, precision, tokenizer_file, rows_file, tmp_path):
    """The default of a GPU without bfloat16, where LoRA's gradients in float16 need their scale."""
    pytest.importorskip("bitsandbytes")
    base = save_llama(tmp_path / "base", tokenizer_file, hidden_size=64, intermediate_size=96, attention_bias=True)
    flags = ("--lora_dropout", 0, "--quantize", scheme)
    for name, more in (("exact", ()), ("mixed", ("--precision", precision))):
        assert go("lora", base, rows_file, tmp_path / name, *flags, *more) == 0
    exact, mixed = curve(tmp_path / "exact"), curve(tmp_path / "mixed")
    assert mixed == pytest.approx(exact, rel=0.01) and mixed != exact and mixed[-1] < mixed[0] - 0.5
    main(["validate", str(tmp_path / "mixed" / "final"), "--accelerator", "cpu"])


# what the result of a full finetune holds


@pytest.fixture(scope="module")
def half(base, tmp_path_factory) -> Path:
    """A base in bfloat16, except its norms."""
    folder = tmp_path_factory.mktemp("m") / "half"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights = {n: w if "norm" in n else w.bfloat16() for n, w in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def dtypes(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as f:
        return {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118


@pytest.mark.parametrize("precision", some(["32-true", "bf16-mixed", "16-mixed", "bf16-true"], "bf16-mixed"))
def test_a_result_has_the_dtypes_of_its_base(precision, base, half, rows_file, tmp_path, capsys):
    """A checkpoint has those of the run, so that the run resumes from what it had."""
    for name, model in (("half", half), ("single", base)):
        out = tmp_path / name
        assert go("full", model, rows_file, out, "--precision", precision, "--train.keep_last", 1) == 0
        (step,) = out.glob("step-*")
        held = "BF16" if precision == "bf16-true" else "F32"
        assert set(dtypes(step).values()) == {held}
        expected = {n: "BF16" if held == "BF16" else kind for n, kind in dtypes(model).items()}
        assert dtypes(out / "final") == expected
        fields = json.loads((out / "final" / "config.json").read_text())
        assert fields["dtype"] == ("float32" if expected["lm_head.weight"] == "F32" else "bfloat16")
        capsys.readouterr()
        main(["validate", str(out / "final"), "--accelerator", "cpu"])
        assert "give their recorded outputs" in capsys.readouterr().out
    final, exact = (load_file(f / "model.safetensors") for f in (tmp_path / "single" / "final", step))
    assert final.keys() == exact.keys() and TrainingState.read(step).trained == {}


# sharded


@pytest.mark.long
def test_sharded_in_mixed_precision(half, rows_file, tmp_path):
    """The numbers of one device, up to the order of sums, which bfloat16 shows."""
    flags = ("--train.micro_batch_size", 1, "--train.max_steps", 4, "--train.max_norm", 0.5, "--optimizer.lr", 3e-4,
             "--eval.max_new_tokens", 3, "--data.val_split_fraction", 0.025, "--precision", "bf16-mixed")  # fmt: skip
    for name, more in (("one", ()), ("two", ("--devices", 2, "--strategy", "fsdp"))):
        (tmp_path / name).mkdir()
        ended(start(tmp_path / name, words("full", half, rows_file, tmp_path / name / "out", *flags, *more)))
    one, two = (curve(tmp_path / name / "out") for name in ("one", "two"))
    assert two[0] == one[0] and two == pytest.approx(one, abs=2e-3)
    alike(tmp_path / "two", 2)
    assert dtypes(tmp_path / "two" / "out" / "final") == dtypes(half)
    main(["validate", str(tmp_path / "two" / "out" / "final"), "--accelerator", "cpu"])


SHARDED = """
import sys, torch
from litgpt.data.batches import Batch
from litgpt.model.gpt import GPT
from litgpt.families import read_config
from litgpt.model.sharded import full_tensor, put
from litgpt.train.devices.fsdp import shard
from litgpt.train.loss import LossModel
torch.set_num_threads(1)
rank, file, bf16 = int(sys.argv[1]), sys.argv[2], torch.bfloat16
torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
fields = {"model_type": "qwen3", "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 32, **sizes}
config = read_config(fields | {"max_position_embeddings": 32}, name="norms of queries and keys")

def gradients(sharded):
    with torch.device("meta"):
        model = LossModel(GPT(config))
    if sharded:
        shard(model, mesh, bf16)
    model.gpt.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        put(p.detach(), 0, torch.randn(p.shape, generator=generator) * 0.1 + ("norm" in name or "ln" in name))
    dtypes = {}
    for name, module in model.named_modules():
        if "weight" in module._parameters:
            module.register_forward_hook(lambda m, *_, name=name: dtypes.update({name: m.weight.dtype}))
    for i in range(2):
        if not sharded or i == rank:
            ids = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(i))
            with torch.autocast("cpu", bf16):
                loss = model(Batch(ids, ids.roll(-1, 1), [12, 20], 32)) / 64
            (loss * (2 if sharded else 1)).backward()
    found = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
    if sharded:
        assert model.read(lambda gpt: gpt(ids).dtype) == bf16
    return dtypes, found

_, expected = gradients(False)
dtypes, found = gradients(True)
for name, dtype in dtypes.items():
    assert dtype == (bf16 if name.endswith((".qkv", ".fc", ".proj")) else torch.float32), (name, dtype)
assert len(dtypes) == 2 * 8 + 3, list(dtypes)
for name, grad in expected.items():
    assert found[name].dtype == torch.float32
    assert (found[name] - grad).norm() < 0.01 * grad.norm(), name
last = "gpt.transformer.ln_f.weight"  # nothing before it is rounded twice: the sum over ranks is not in bfloat16
assert (found[last] - expected[last]).norm() < 1e-6 * expected[last].norm()
name = "gpt.transformer.h.1.mlp.proj.weight"
assert (found[name] - expected[name]).norm() < 1e-4 * expected[name].norm()
"""


@pytest.mark.long
def test_what_is_gathered(tmp_path):
    """Matrices of the blocks in bfloat16, everything else in float32; gradients are summed in float32."""
    command = [sys.executable, "-c", SHARDED]
    ranks = [subprocess.Popen([*command, str(i), str(tmp_path / "f")], stderr=subprocess.PIPE) for i in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors[0][-2000:]


def test_mixed_sharding_takes_every_norm():
    """Every family's norms are of the classes that `shard` gathers in float32."""
    from litgpt.train.devices.fsdp import NORMS
    from tests.families import ALL, FAMILIES

    for family, case in ALL:
        with torch.device("meta"):
            model = GPT(read_config(FAMILIES[family][case] | {"model_type": family}, name="x"))
        norms = [m for name, m in model.named_modules() if "norm" in name.rpartition(".")[2] and list(m.parameters())]
        assert all(isinstance(norm, NORMS) for norm in norms)
