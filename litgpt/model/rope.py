"""Rotary position embedding (https://arxiv.org/abs/2104.09864).

Shapes: B rows, T tokens, n heads, hs head size.
"""

import math

import torch

from litgpt.config import Config


def inverse_frequencies(config: Config) -> torch.Tensor:
    """Radians per position for each pair of dimensions, in float32, on the CPU.

    Returns:
        (hs / 2,)

    Raises:
        KeyError: `config.rope_type` is none of `ROPE_TYPES`; families refuse those by name before.
    """
    assert config.head_size is not None
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu") / config.head_size
    return ROPE_TYPES[config.rope_type](1 / config.rope_base**pairs, config)


def llama3(inverse: torch.Tensor, config: Config) -> torch.Tensor:
    """Slow rotations are slowed by `factor`, fast ones stay, those in between are blended.

    The formula is that of Llama 3.1 (https://arxiv.org/abs/2407.21783 and the released code).
    """
    numbers = config.rope_adjustments
    factor, low, high = (float(numbers[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = numbers["original_max_position_embeddings"] * inverse / (2 * math.pi)  # over the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (share + (1 - share) / factor)


ROPE_TYPES = {
    "default": lambda inverse, config: inverse,
    "linear": lambda inverse, config: inverse / float(config.rope_adjustments["factor"]),
    "llama3": llama3,
}


def rope_table(inverse: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `positions` (T,), each (T, 1, hs / 2), computed in float32."""
    angles = (positions.to(inverse.dtype)[:, None] * inverse)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` (B, T, n, hs); the first half of a head pairs with its second half."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
