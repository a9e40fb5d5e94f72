"""MXFP4, the 4-bit type of gpt-oss' experts: 32 numbers of a row share a scale, a power of two.

https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf. A tensor `NAME` (experts,
columns, rows) is stored as `NAME_blocks` (experts, rows, columns / 32, 16), two numbers in a byte, the first in its
lower half, and `NAME_scales` (experts, rows, columns / 32), the exponents plus 127.
"""

from typing import Any

import torch

BLOCKS, SCALES = "_blocks", "_scales"
SIZE, BIAS = 32, 127
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of 3 bits; the fourth is the sign


def is_mxfp4(fields: dict[str, Any]) -> bool:
    """Whether a `config.json` describes such weights."""
    quantization = fields.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(..., blocks * 32) from (..., blocks, 16) and (..., blocks), exact, in bfloat16."""
    values = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16, device=blocks.device)
    pairs = torch.cartesian_prod(values, values).flip(1)  # by byte
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - BIAS).to(torch.bfloat16)
    return (pairs[blocks.int()].flatten(-2) * powers[..., None]).flatten(-2)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of (..., blocks * 32). What `dequantized` returns does not change."""
    numbers = weight.float().contiguous().unflatten(-1, (-1, SIZE))
    largest = numbers.abs().amax(-1)
    exponents = torch.frexp(largest).exponent.sub(3).clamp(-BIAS, BIAS)  # the largest becomes 4 to 8
    magnitudes = torch.ldexp(numbers.abs(), -exponents[..., None])
    values = torch.tensor(VALUES, device=weight.device)
    codes = torch.bucketize(magnitudes, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    codes |= (numbers < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + BIAS).to(torch.uint8)
