"""The peak matmul throughput of GPUs, from NVIDIA's datasheets and architecture whitepapers."""

import re
from typing import NamedTuple, Optional

import torch


class Peak(NamedTuple):
    """TFLOPS without sparsity, and with float32 accumulation where that is slower, as on GeForce cards."""

    name: str  # matches all of the device's name after NVIDIA, GeForce, or Tesla
    bf16: Optional[float]  # None: not native
    fp16: float
    fp32: float  # not TF32: `32-true` runs are exact, and others compute little in float32
    source: str


PEAKS = (
    Peak(r"V100-SXM\d-\d+GB", None, 125, 15.7, "V100 datasheet"),
    Peak(r"V100-PCIE-\d+GB", None, 112, 14, "V100 datasheet"),
    Peak(r"V100S-PCIE-32GB", None, 130, 16.4, "V100 datasheet"),
    Peak(r"T4", None, 65, 8.1, "T4 datasheet"),
    Peak(r"A10G", 70, 70, 35, "A10G datasheet"),
    Peak(r"A100(-SXM4|-PCIE)?[- ]\d+GB( PCIe)?", 312, 312, 19.5, "A100 datasheet"),
    Peak(r"RTX 3090", 71, 71, 35.6, "Ampere GA102 whitepaper"),
    Peak(r"L4", 121, 121, 30.3, "L4 datasheet, half of the figures with sparsity"),
    Peak(r"L40S", 362.05, 362.05, 91.6, "L40S datasheet"),
    Peak(r"RTX 4090", 165.2, 165.2, 82.6, "Ada GPU architecture whitepaper"),
    Peak(r"H100 \d+GB HBM3", 989.4, 989.4, 66.9, "H100 whitepaper, SXM5"),
    Peak(r"H100 (PCIe|\d+GB HBM2e)", 756, 756, 51.2, "H100 whitepaper, PCIe"),
    Peak(r"H100 NVL", 835.5, 835.5, 60, "H100 datasheet, half of the figures with sparsity"),
    Peak(r"H200", 989.4, 989.4, 66.9, "H200 datasheet, SXM, the rates of the H100"),
    Peak(r"H200 NVL", 835.5, 835.5, 60, "H200 datasheet, half of the figures with sparsity"),
    Peak(r"B200", 2250, 2250, 75, "HGX B200 datasheet, an eighth of half of the figures with sparsity"),
    Peak(r"RTX 5090", 209.5, 209.5, 104.8, "RTX Blackwell GPU architecture whitepaper"),
    Peak(r"RTX PRO 6000 Blackwell Workstation Edition", 503.8, 503.8, 126, "RTX PRO Blackwell whitepaper"),
    Peak(r"RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9, 438.9, 109.7, "RTX PRO Blackwell whitepaper"),
    # the datasheet has FP32 alone; the ratios are those of the workstation edition
    Peak(r"RTX PRO 6000 Blackwell Server Edition", 480, 480, 120, "RTX PRO 6000 Server Edition datasheet"),
)


def find_peak(name: str) -> Optional[Peak]:
    """The entry for a device of this name, as `torch.cuda.get_device_name` returns it; None for others. A part of a
    GPU (MIG), a laptop's GPU, and variants such as the RTX 4090 D have other rates."""
    short = re.sub(r"^(NVIDIA )?(GeForce |Tesla )?", "", name)
    return next((peak for peak in PEAKS if re.fullmatch(peak.name, short)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> Optional[float]:
    """The FLOPs per second of matmuls in this dtype at the device's peak; None if unknown."""
    peak = find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    rate = {torch.bfloat16: peak.bf16, torch.float16: peak.fp16, torch.float32: peak.fp32}.get(dtype)
    return None if rate is None else rate * 1e12
