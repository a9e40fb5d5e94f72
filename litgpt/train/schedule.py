"""The learning rate over a run."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(
    step: int, total: float, warmup: float, peak: float, least: float, schedule: Schedule = "cosine"
) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    It rises linearly to `peak` over the first `warmup` steps. Then it decays to `least` at step `total`, along a cosine
    (https://arxiv.org/abs/1608.03983) or a line, or stays at `peak`. `total` and `warmup` may be estimates: fractional
    or infinite.
    """
    if step < warmup:
        return peak * min(step + 1, warmup) / warmup if warmup < math.inf else 0.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
    return least + (peak - least) * remaining
