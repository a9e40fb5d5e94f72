"""Several devices give the numbers and the folder of one; when one of them fails, all end."""

import re
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from litgpt.checkpoint.folder import write_file
from litgpt.errors import UserError, remark
from litgpt.families.weights import Outline
from litgpt.model import devices
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.sharded import full_tensor, local_shard, my_rows, put, total_norm
from litgpt.train import run
from litgpt.train.devices import launch
from tests.ranks import alike, curve, ended, start
from tests.runs import go, same, words

FULL = ("--train.micro_batch_size", 1, "--train.max_steps", 4, "--eval.max_new_tokens", 3, "--train.max_norm", 0.5,
        "--data.val_split_fraction", 0.025, "--eval.interval", 2, "--train.save_interval", 2)  # fmt: skip
TWO = ("--devices", 2, "--strategy")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def alone(base, rows_file, tmp_path_factory):
    """The folder of a full finetune in one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    ended(start(out.parent, words("full", base, rows_file, out, *FULL)))
    return out


def same_result(one, several):
    """Assert that two runs had the same losses and left the same folder."""
    assert len(curve(one)) > 4 and curve(several) == pytest.approx(curve(one), abs=1e-4)
    assert {p.name for p in several.iterdir()} == {p.name for p in one.iterdir()}
    names = {p.name for p in (one / "final").iterdir()}
    assert {p.name for p in (several / "final").iterdir()} == names
    for name in (n for n in names if n.endswith(".safetensors")):
        ours, theirs = load_file(several / "final" / name), load_file(one / "final" / name)
        assert list(ours) == list(theirs)
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            assert torch.allclose(ours[key], tensor, atol=2e-3), key
    for name in names - {"parity.json", "hyperparameters.yaml", "checksums.json", "README.md", "run.lock"}:
        if not name.endswith(".safetensors"):
            assert (several / "final" / name).read_bytes() == (one / "final" / name).read_bytes()


def test_sharded(alone, base, rows_file, tmp_path):
    """There is one validation row: the second device has none."""
    text = ended(start(tmp_path, words("full", base, rows_file, tmp_path / "out", *FULL, *TWO, "fsdp")))
    assert (
        "2 x cpu (fsdp)" in text and text.count("validation loss") == len(re.findall("step ./4 . validation", text)) + 1
    )
    same_result(alone, tmp_path / "out")
    alike(tmp_path, 2)


def test_torchrun(alone, base, rows_file, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    text = ended(start(tmp_path, words("full", base, rows_file, tmp_path / "out", *FULL), *launcher))
    assert "2 x cpu (ddp)" in text
    same_result(alone, tmp_path / "out")
    alike(tmp_path, 2)


def test_a_killed_rank_ends_all(base, rows_file, tmp_path):
    out = words("full", base, rows_file, tmp_path / "out", *FULL, *TWO, "ddp")
    process = start(tmp_path, out, FAULT="1:3:kill")
    text = ended(process, code=1)
    assert "the process of device 1 was killed by signal 9" in text
    assert not (tmp_path / "out" / "final").exists()


AVERAGING = """
import sys, torch
from litgpt.train.devices.fsdp import average
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
who = {"both": (0, 1), "first": (0,), "second": (1,), "nobody": ()}
kinds = [torch.float32, torch.bfloat16]
made = {(w, k): torch.nn.Parameter(torch.zeros(2, 3, dtype=k)) for w in who for k in kinds}
for (w, k), p in made.items():
    if rank in who[w]:
        p.grad = torch.full_like(p, 2.0 + 4 * rank)
average(list(made.values()))
expected = {"both": 4.0, "first": 1.0, "second": 3.0}
for (w, k), p in made.items():
    assert (p.grad is None) == (w == "nobody"), (rank, w, k)
    assert p.grad is None or (p.grad.dtype == k and torch.equal(p.grad, torch.full_like(p, expected[w]))), (rank, w, k)
"""


def test_gradients_that_some_rank_lacks(tmp_path):
    """All have the mean, or their parameters would no longer be the same; what nobody has nobody gets."""
    command = [sys.executable, "-c", AVERAGING]
    ranks = [subprocess.Popen([*command, str(i), str(tmp_path / "f")], stderr=subprocess.PIPE) for i in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors


def test_layout(monkeypatch):
    for name in ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert launch.layout(CPU, 3, 2) == (3, 2) and launch.layout(CPU, "auto", 1) == (1, 1)
    with pytest.raises(UserError, match="--devices 3"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        launch.layout(torch.device("cuda"), 3, 1)
    assert launch.layout(torch.device("cuda"), "auto", 1) == (2, 1)


def test_layout_of_torchrun(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert launch.layout(CPU, 1, 1) == launch.layout(CPU, 4, 2) == launch.layout(CPU, "auto", 1) == (4, 2)
    with pytest.raises(UserError, match="--devices 2, but torchrun started 4"):
        launch.layout(CPU, 2, 1)
    with pytest.raises(UserError, match="--num_nodes 3, but torchrun"):
        launch.layout(CPU, 1, 3)


def test_layout_of_slurm(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    for name, value in {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert launch.layout(CPU, 1, 1) == (2, 2)
    monkeypatch.setenv("SLURM_NNODES", "3")
    with pytest.raises(UserError, match="SLURM runs 4 tasks on 3 machines"):
        launch.layout(CPU, 1, 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")  # a job of one task starts its own processes
    assert launch.layout(CPU, 2, 1) == (2, 1)


@pytest.mark.parametrize("method", ["lora-bf16", "full"])
def test_one_device_does_what_lightning_does(method, base, rows_file, tmp_path, monkeypatch):
    flags = (method, base, rows_file)
    assert go(*flags, tmp_path / "one") == 0
    monkeypatch.setattr(run, "make_fabric", launch.make_lightning)
    assert go(*flags, tmp_path / "lightning") == 0
    same(tmp_path / "one", tmp_path / "lightning")


def test_strategy():
    with torch.device("meta"):
        model = GPT(Config(n_layer=1, n_embd=64, n_head=2, padded_vocab_size=100))
    size = 4 * sum(p.numel() for p in model.parameters())

    def picked(memory, wanted="auto", quantize=None, precision="32-true"):
        return launch.pick_strategy(wanted, model, precision, quantize, memory)

    assert picked(6 * size) == "ddp" and picked(4 * size) == "fsdp" and picked(None) == "ddp"
    assert picked(4 * size, "ddp") == "ddp" and picked(6 * size, "fsdp") == "fsdp"
    model.requires_grad_(False)
    assert picked(2 * size) == "ddp" and picked(size) == "fsdp" and picked(size, quantize="bnb.nf4") == "ddp"
    with pytest.raises(UserError, match=r"--strategy fsdp .*--quantize bnb\.nf4"):
        picked(size, "fsdp", "bnb.nf4")
    with pytest.raises(UserError, match="--precision 16-mixed"):
        picked(size, "fsdp", precision="16-mixed")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_other_processes_are_silent(monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    remark("once")
    monkeypatch.setenv("LOCAL_RANK", "1")
    remark("twice")
    assert capsys.readouterr().err == "litgpt: once\n"


def test_rows_of_a_plain_tensor():
    """What is not sharded goes through the same functions."""
    tensor = torch.zeros(4, 2)
    put(tensor, 1, torch.ones(2, 2))
    assert tensor[:, 0].tolist() == [0, 1, 1, 0] and full_tensor(tensor) is tensor and local_shard(tensor) is tensor
    assert my_rows(tensor) == slice(0, 4) and float(total_norm([tensor, tensor])) == pytest.approx(8**0.5)


def test_a_file_of_two_widths(tmp_path):
    """What another part of the model needs wider begins where a wide number may begin."""
    weights = {"wide": torch.randn(3), "narrow": torch.randn(5).bfloat16(), "odd": torch.ones(3, 1).to(torch.int8)}
    kinds = {"wide": "F32", "narrow": "BF16", "odd": "I8"}
    outlines = [Outline(name, kinds[name], tuple(t.shape)) for name, t in weights.items()]
    write_file(tmp_path / "x.safetensors", outlines, weights.items())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[n], t) for n, t in weights.items())


def test_a_small_model_takes_few_threads(monkeypatch):
    wanted: list[int] = []
    monkeypatch.setattr(devices, "THREADS", 8)
    monkeypatch.setattr(devices, "CHOSEN", False)
    monkeypatch.setattr(torch, "set_num_threads", wanted.append)
    for size, n in ((1, 1), (3, 1), (3, 2), (50, 1), (50, 2), (50, 16)):
        model = torch.nn.Linear(1000, 1000 * size, device="meta")
        devices.share_threads(model, torch.device("cpu"), n)
    devices.share_threads(model, torch.device("cuda"))
    monkeypatch.setattr(devices, "CHOSEN", True)
    devices.share_threads(model, torch.device("cpu"))
    assert wanted == [1, 3, 3, 8, 4, 1]
