"""MFU relative to the peak of the hardware, where that is known."""

import pytest
import torch

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.train import flops
from litgpt.train.peaks import PEAKS, find_peak, peak_flops
from tests.runs import go

CUDA = torch.device("cuda", 0)
NAMES = {  # as CUDA has them: TFLOPS in bfloat16 (float16 where that is not native) and float32
    "Tesla V100-SXM2-16GB": (125, 15.7),
    "Tesla V100-SXM3-32GB": (125, 15.7),
    "Tesla V100-PCIE-32GB": (112, 14),
    "Tesla V100S-PCIE-32GB": (130, 16.4),
    "Tesla T4": (65, 8.1),
    "NVIDIA A10G": (70, 35),
    "NVIDIA A100-SXM4-40GB": (312, 19.5),
    "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "A100-SXM4-40GB": (312, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 19.5),
    "NVIDIA GeForce RTX 3090": (71, 35.6),
    "NVIDIA L4": (121, 30.3),
    "NVIDIA L40S": (362.05, 91.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA H100 80GB HBM3": (989.4, 66.9),
    "NVIDIA H100 PCIe": (756, 51.2),
    "NVIDIA H100 NVL": (835.5, 60),
    "NVIDIA H200": (989.4, 66.9),
    "NVIDIA H200 NVL": (835.5, 60),
    "NVIDIA B200": (2250, 75),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (503.8, 126),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (438.9, 109.7),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": (480, 120),
}
UNKNOWN = (
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA A10",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA L40",
    "NVIDIA T400 4GB",
    "NVIDIA H20",
    "NVIDIA GH200 480GB",
    "NVIDIA B200 NVL",
    "AMD Instinct MI300X",
    "",
)


@pytest.mark.parametrize("name", NAMES)
def test_known_devices(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    half, single = NAMES[name]
    old = name.startswith("Tesla")
    assert peak_flops(CUDA, torch.bfloat16) == (None if old else half * 1e12)
    assert peak_flops(CUDA, torch.float16) == half * 1e12 and peak_flops(CUDA, torch.float32) == single * 1e12
    assert peak_flops(CUDA, torch.float64) is None and peak_flops(torch.device("cpu"), torch.float32) is None


def test_unknown_devices():
    assert not [name for name in UNKNOWN if find_peak(name)]
    assert {find_peak(name) for name in NAMES} == set(PEAKS)


def test_the_peak_replaces_the_timing(monkeypatch):
    with torch.device("meta"):
        model = GPT(Config(n_layer=1, n_embd=32, n_head=2, padded_vocab_size=64, block_size=32))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(flops, "gemm_throughput", lambda *_: 7.0)
    counter = flops.FlopCounter.of(model, CUDA, torch.bfloat16)
    assert (counter.peak, counter.name) == (989.4e12, "MFU")
    seconds = (counter.per_token * 1000 + counter.per_target * 500) / 989.4e12 / 2
    assert counter.share(1000, 500, seconds * 4, devices=1) == pytest.approx(0.5)
    assert counter.share(1000, 500, seconds * 4, devices=2) == pytest.approx(0.25)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090 D")
    counter = flops.FlopCounter.of(model, CUDA, torch.bfloat16)
    assert (counter.peak, counter.name) == (7.0, "GEMM utilization")


def test_its_name_is_on_the_screen(base, rows_file, tmp_path, monkeypatch, capsys):
    for peak, name in ((1e15, "MFU "), (None, "GEMM utilization ")):
        monkeypatch.setattr(flops, "peak_flops", lambda *_, peak=peak: peak)
        assert go("lora", base, rows_file, tmp_path / name, "--train.max_steps", 2) == 0
        assert f"\n {name}" in capsys.readouterr().out
