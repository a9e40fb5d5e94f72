"""Rotary position embedding (https://arxiv.org/abs/2104.09864).

Shapes: B rows, T tokens, n heads, hs head size, p pairs of dimensions that rotate.
"""

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch

from litgpt.model.config import Config
from litgpt.model.devices import to_device

CosSin = tuple[torch.Tensor, torch.Tensor]
Numbers = dict[str, Any]


class Rope:
    """Cosines and sines of positions, for every layer that shares this rope. `size` dimensions of a head rotate, in
    pairs; an odd one has a pair of its own. The slowest rotation is about `base` times slower than the fastest.
    `numbers` has what a `rope_type` needs, by the names of Hugging Face. `interleave` is as in `apply_rope`."""

    def __init__(self, size: int, base: float, rope_type: str, numbers: Numbers, interleave: bool = False) -> None:
        # on the CPU, even if the weights are on the meta device: no checkpoint holds them
        powers = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
        # (1 or 2, p) radians per position: the second row is for sequences longer than `switch`
        self.inverse, self.factor = ROPE_TYPES[rope_type](base**powers, numbers, size, base)
        self.interleave = interleave
        self.switch: Optional[int] = None
        if len(self.inverse) == 2:
            self.switch = int(numbers["original_max_position_embeddings"])

    def table(
        self, positions: torch.Tensor, seqlens: Sequence[int], lengths: Sequence[int], dtype: torch.dtype
    ) -> CosSin:
        """Cosines and sines for positions (T,), each (T, 1, 2 p), in float32. `lengths` include cached tokens."""
        if self.inverse.device != positions.device:
            self.inverse = self.inverse.to(positions.device)
        inverse = self.inverse[0]
        if self.switch is not None:
            longer = torch.tensor([int(n > self.switch) for n in lengths]).repeat_interleave(torch.tensor(seqlens))
            inverse = self.inverse[to_device(positions.device, longer)[0]]
        angles = (positions.float()[:, None] * inverse)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1:
            cos, sin = cos * self.factor, sin * self.factor
        return join_pairs(cos, cos, self.interleave).to(dtype), join_pairs(-sin, sin, self.interleave).to(dtype)


def make_ropes(config: Config) -> list[Rope]:
    if config.rope_n_elem == 0:
        return []
    sizes = {config.rope_kind(i): config.of_layer(i).rope_n_elem for i in range(config.n_layer)}
    size, interleave = config.rope_n_elem, config.rope_interleave
    ropes = [Rope(sizes.get(0, size), config.rope_base, config.rope_type, config.rope_adjustments, interleave)]
    if config.rope_local_base_freq is not None:
        ropes.append(Rope(sizes.get(1, size), config.rope_local_base_freq, "default", {}, interleave))
    return ropes


def join_pairs(a: torch.Tensor, b: torch.Tensor, interleave: bool) -> torch.Tensor:
    """The first and the second number of each pair, each (..., p), in the order of a head, (..., 2 p)."""
    return torch.stack([a, b], dim=-1).flatten(-2) if interleave else torch.cat([a, b], dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool = False) -> torch.Tensor:
    """Rotate the first 2 p dimensions of `x` (B, T, n, hs). The first half of them pairs with the second; with
    `interleave` each dimension pairs with its neighbor."""
    size = cos.size(-1)
    a = x if size == x.size(-1) else x[..., :size]
    others = join_pairs(a[..., 1::2], a[..., ::2], True) if interleave else a.roll(size // 2, -1)
    rotated = torch.addcmul(a * cos, others, sin)  # (a cos - b sin, b cos + a sin)
    return rotated if size == x.size(-1) else torch.cat([rotated, x[..., size:]], dim=-1)


# Each type maps positions per radian, (p,), to radians per position and a factor for cosines and sines.


def default(slowness: torch.Tensor, numbers: Numbers, size: int, base: float) -> tuple[torch.Tensor, float]:
    return (1 / slowness)[None], 1.0


def linear(slowness: torch.Tensor, numbers: Numbers, size: int, base: float) -> tuple[torch.Tensor, float]:
    """Slows all rotations by `factor`."""
    return (1 / slowness / float(numbers["factor"]))[None], 1.0


def llama3(slowness: torch.Tensor, numbers: Numbers, size: int, base: float) -> tuple[torch.Tensor, float]:
    """Slows slow rotations by `factor`, keeps fast ones and blends those in between. As in Llama 3.1
    (https://arxiv.org/abs/2407.21783 and the released code)."""
    factor, low, high = (float(numbers[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    inverse = 1 / slowness
    turns = numbers["original_max_position_embeddings"] * inverse / (2 * math.pi)  # over the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (inverse * (share + (1 - share) / factor))[None], 1.0


def yarn(slowness: torch.Tensor, numbers: Numbers, size: int, base: float) -> tuple[torch.Tensor, float]:
    """As `llama3`, but blends by pair and raises the temperature of attention (https://arxiv.org/abs/2309.00071)."""
    factor, original = float(numbers["factor"]), numbers["original_max_position_embeddings"]

    def pair(turns: float) -> float:  # the pair with this many turns over the original context
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(numbers.get("beta_fast") or 32), pair(numbers.get("beta_slow") or 1)
    if numbers.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(len(slowness), dtype=torch.float32, device="cpu")
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)

    temperature = numbers.get("attention_factor")
    if temperature is None:
        mscale, all_dim = numbers.get("mscale"), numbers.get("mscale_all_dim")
        temperature = yarn_scale(factor, mscale if mscale and all_dim else 1.0)
        temperature /= yarn_scale(factor, all_dim if mscale and all_dim else 0.0)
    return (slowed / (factor * slowness) + (1 - slowed) / slowness)[None], float(temperature)


def yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope(slowness: torch.Tensor, numbers: Numbers, size: int, base: float) -> tuple[torch.Tensor, float]:
    """A factor for each pair, with a second set beyond the original context (https://arxiv.org/abs/2402.13753)."""
    factors = torch.tensor([numbers["short_factor"], numbers["long_factor"]], dtype=torch.float32, device="cpu")
    factor, original = float(numbers["factor"]), numbers["original_max_position_embeddings"]
    temperature = numbers.get("attention_factor")
    if temperature is None:
        temperature = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1 / (factors * slowness), float(temperature)


def proportional(slowness: torch.Tensor, numbers: Numbers, size: int, base: float) -> tuple[torch.Tensor, float]:
    """Only a share of the pairs rotates, the fast ones, slowed by `factor`. As in Gemma 4."""
    rotating = int(numbers.get("partial_rotary_factor", 1.0) * size // 2)
    inverse = torch.cat([1 / slowness[:rotating], torch.zeros_like(slowness[rotating:])])
    return (inverse / float(numbers.get("factor", 1.0)))[None], 1.0


ROPE_TYPES = {f.__name__: f for f in (default, linear, llama3, yarn, longrope, proportional)}
