"""LitGPT's functions for rotary positions, for code that uses them without a model.

Shapes: B rows, T tokens, n heads, hs head size.
"""

from typing import Any, Optional

import torch

from litgpt.errors import UserError
from litgpt.model.config import LITGPT_LLAMA3
from litgpt.model.rope import Rope


def build_rope_cache(
    seq_len: int,
    n_elem: int,
    device: Optional[torch.device] = None,
    base: int = 10000,
    condense_ratio: int = 1,
    extra_config: Optional[dict[str, Any]] = None,
    rope_local_base_freq: Optional[float] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the positions 0 to `seq_len` - 1, each (T, n_elem). With a local base (T, n_elem, 2), where
    the second ones are local.

    Args:
        seq_len: Number of positions.
        n_elem: How many dimensions of a head rotate.
        device: Device of the results.
        base: The slowest rotation is about this many times slower than the fastest.
        condense_ratio: Positions are divided by it.
        extra_config: `rope_adjustments` of a `Config`.
        rope_local_base_freq: The base of the local rope.
    """
    numbers = {LITGPT_LLAMA3.get(key, key): value for key, value in (extra_config or {}).items()}
    if numbers and numbers.keys() not in ({"factor"}, set(LITGPT_LLAMA3.values())):
        raise UserError(f"rope_adjustments with {', '.join(numbers)} are not implemented.")
    kind = "default" if not numbers else "linear" if len(numbers) == 1 else "llama3"
    ropes = [Rope(n_elem, base, kind, numbers)]
    if rope_local_base_freq is not None:
        ropes.append(Rope(n_elem, rope_local_base_freq, "default", {}))
    positions = torch.arange(seq_len, device=device) / condense_ratio
    angles = [(positions[:, None] * rope.inverse[0].to(positions.device)).repeat(1, 2) for rope in ropes]
    together = angles[0] if len(angles) == 1 else torch.stack(angles, dim=-1)
    return together.cos(), together.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` (B, n, T, hs) by cosines and sines (1 or B, T, hs). The first half of a head pairs with the second."""
    if cos.dim() != 3:
        raise UserError(f"cos must have three dimensions, but has the shape {tuple(cos.shape)}.")
    a, b = x.chunk(2, dim=-1)
    return (x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]).to(x.dtype)
